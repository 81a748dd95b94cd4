"""The command that the refusal of a pickle names is one that works."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
import transformers as T
from hf_reference import SMALL, random_model
from safetensors.torch import load_file

from layerwise.errors import BadInput
from layerwise.models.load import load_any


def _named(source):
    with pytest.raises(BadInput, match="pickle") as refused:
        load_any(source)
    return str(refused.value).splitlines()[-1].strip()


def _done(command):
    words = shlex.split(command)
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)


def test_a_folder_of_transformers(tmp_path):
    theirs = random_model(T.LlamaForCausalLM, T.LlamaConfig(**SMALL))
    folder = tmp_path / "it's mine"
    theirs.config.architectures = ["LlamaForCausalLM"]
    theirs.config.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    _done(_named(folder))
    model = load_any(tmp_path / "it's mine-safetensors")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model({"input_ids": ids}).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_file_of_torch(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    torch.save({"a": shared, "b": shared, "turned": shared.T, "step": 3}, tmp_path / "last.ckpt")
    _done(_named(tmp_path))
    found = load_file(tmp_path / "last.safetensors")
    assert found.keys() == {"a", "b", "turned"} and torch.equal(found["b"], shared) and torch.equal(found["turned"], shared.T)


@pytest.mark.parametrize("named", ["x; import os", "Llama'", "__import__", 3, None])
def test_what_a_config_calls_itself_is_not_taken_into_a_command(tmp_path, named):
    (tmp_path / "config.json").write_text(
        f'{{"model_type": "llama", "architectures": [{"null" if named is None else repr(named)}]}}'.replace("'", '"')
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert re.search(r"t\.AutoModel\.from_pretrained", _named(tmp_path))
