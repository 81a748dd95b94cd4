"""Which edits make a model as small, or as fast, as is wanted at the least loss: what each costs, what each damages, and the search."""
