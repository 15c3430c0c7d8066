"""Weights of other programs in every form that they come in, and what is refused, by name."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact
from ldm_scale.interchange.compvis_file import read_checkpoint
from ldm_scale.interchange.diffusers_import import read_foreign_diffusers
from ldm_scale.interchange.foreign_weights import DIFFUSERS_STEMS, read_foreign_tensors
from ldm_scale.interchange.load import load_autoencoder
from ldm_scale.interchange.safetensors_io import read_tensors
from tests.helpers.foreign import (
    autoencoder_kl,
    edit,
    vq_model,
)
from tests.helpers.mutations import mutate

_diffusers: Any = diffusers
SAFETENSORS, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    autoencoder_kl().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def tensors(folder: Path) -> dict[str, Tensor]:
    return read_foreign_tensors(folder, DIFFUSERS_STEMS)


def resave(folder: Path, form: str) -> None:
    """The same weights as diffusers writes them in another form."""
    model = _diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / SAFETENSORS).unlink()
    if form == "sharded":
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*-of-*"))) > 1
    elif form == "sharded variant":
        model.save_pretrained(folder, max_shard_size="40KB", variant="fp32")
    elif form == "bin":
        model.save_pretrained(folder, safe_serialization=False)
    elif form == "old bin":
        torch.save(model.state_dict(), folder / BIN, _use_new_zipfile_serialization=False)
    else:
        model.save_pretrained(folder, variant="ema")
    assert not (folder / SAFETENSORS).exists()


@pytest.mark.parametrize("form", ["sharded", "sharded variant", "bin", "old bin", "variant"])
def test_all_forms_hold_the_same(vae: Path, form: str) -> None:
    expected = tensors(vae)
    resave(vae, form)
    found = tensors(vae)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_is_widened_and_said(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = type("Log", (), {"info": lambda self, message: said.append(message)})()
    monkeypatch.setattr("ldm_scale.interchange.foreign_weights.get_logger", lambda: log)
    expected = {name: x.half().float() for name, x in tensors(vae).items()}
    _diffusers.AutoencoderKL.from_pretrained(vae).half().save_pretrained(vae, variant="fp16")
    assert not said, "the plain file goes first"
    (vae / SAFETENSORS).unlink()
    found = tensors(vae)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any("variant fp16" in message for message in said)
    assert any("float16: read as float32" in message for message in said)


def test_published_names_of_old_attention(vae: Path) -> None:
    expected = read_foreign_diffusers(vae)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, x in load_file(vae / SAFETENSORS).items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        renamed[name] = x
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, vae / SAFETENSORS)
    assert read_foreign_diffusers(vae).content_hash == expected.content_hash


def test_an_autoencoder_alone(vae: Path) -> None:
    artifact = read_foreign_diffusers(vae)
    assert isinstance(artifact, Artifact)
    assert (artifact.statistics.scale, artifact.statistics.shift) == (0.18215, 0.0)
    assert artifact.provenance["resolution"] == 16
    theirs = _diffusers.AutoencoderKL.from_pretrained(vae).eval()
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.mode() * 0.18215
    assert torch.allclose(load_autoencoder(vae).encode(x), expected, atol=1e-5)


class Harmless:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (print, ("this must never run",))


def write_index(folder: Path, places: object) -> None:
    (folder / SAFETENSORS).unlink()
    (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps({"weight_map": places}))


def damages() -> dict[str, tuple[Callable[[Path], object], str]]:
    def pickled(folder: Path) -> None:
        (folder / SAFETENSORS).unlink()
        torch.save({"weight": Harmless()}, folder / BIN)

    def cut(folder: Path, name: str = SAFETENSORS) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    def cut_bin(folder: Path) -> None:
        resave(folder, "bin")
        cut(folder, BIN)

    def nested(folder: Path) -> None:
        (folder / SAFETENSORS).unlink()
        torch.save({"state_dict": {"weight": torch.zeros(1)}}, folder / BIN)

    def variants(folder: Path) -> None:
        for name in ("fp16", "non_ema"):
            (folder / f"diffusion_pytorch_model.{name}.safetensors").write_bytes((folder / SAFETENSORS).read_bytes())
        (folder / SAFETENSORS).unlink()

    def other_tensors(folder: Path) -> None:
        state = load_file(folder / SAFETENSORS)
        state["extra.weight"] = state.pop("quant_conv.bias")
        state["post_quant_conv.bias"] = torch.zeros(9)
        save_file(state, folder / SAFETENSORS)

    def integers(folder: Path) -> None:
        state = load_file(folder / SAFETENSORS)
        save_file(state | {"quant_conv.weight": state["quant_conv.weight"].long()}, folder / SAFETENSORS)

    def sparse(folder: Path) -> None:
        state = load_file(folder / SAFETENSORS)
        (folder / SAFETENSORS).unlink()
        torch.save(state | {"quant_conv.weight": state["quant_conv.weight"].to_sparse()}, folder / BIN)

    return {
        "pickle": (pickled, r"is a pickle of more than tensors .*weights_only=False.*save_file"),
        "cut": (cut, r"cannot be read .*damaged or cut short"),
        "cut bin": (cut_bin, r"bin cannot be read .*damaged or cut short"),
        "empty bin": (lambda f: ((f / SAFETENSORS).unlink(), (f / BIN).touch()), r"bin cannot be read"),
        "nested": (nested, r"bin holds a dict, expected names and tensors; give a model's file"),
        "none": (lambda f: (f / SAFETENSORS).unlink(), r"vae holds no weights \(diffusion_pytorch_model.safetensors"),
        "variants": (variants, r"as the variants fp16 and non_ema, none of them the plain one"),
        "no map": (lambda f: write_index(f, []), r"index\.json has no weight_map"),
        "no shard": (lambda f: write_index(f, {"a": "../x-00001-of-00002.safetensors"}), r"vae/x-00001.* is missing"),
        "index of itself": (
            lambda f: write_index(f, {"a": f"{SAFETENSORS}.index.json"}),
            r"index\.json cannot be read .*damaged",
        ),
        "number for a shard": (lambda f: write_index(f, {"a": 5}), r"index\.json has no weight_map"),
        "list for a shard": (lambda f: write_index(f, {"a": ["x"]}), r"index\.json has no weight_map"),
        "integers": (integers, r"quant_conv\.weight is of type torch\.int64, expected floating"),
        "sparse": (sparse, r"quant_conv\.weight is torch\.sparse_coo, expected plain values"),
        "tensors": (
            other_tensors,
            r"are not those of config\.json: 1 missing \(quant_conv\.bias\); 1 not expected \(extra\.weight\); "
            r"1 of another shape \(post_quant_conv\.bias \(9,\) instead of \(4,\)\)",
        ),
        "no config": (lambda f: (f / "config.json").unlink(), "holds neither model_index.json nor config.json"),
        "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        "no class": (lambda f: edit(f / "config.json", _class_name=None), "has no _class_name"),
        "class": (lambda f: edit(f / "config.json", _class_name="AutoencoderTiny"), "'AutoencoderTiny': alone, only"),
        "activation": (
            lambda f: edit(f / "config.json", act_fn="relu"),
            r"act_fn='relu': .* compute what act_fn='silu'",
        ),
        "no quant_conv": (lambda f: edit(f / "config.json", use_quant_conv=False), "use_quant_conv=False"),
        "means": (lambda f: edit(f / "config.json", latents_mean=[0.0] * 4), "latents_mean="),
        "widths": (lambda f: edit(f / "config.json", block_out_channels=[8, 12]), r"block_out_channels=\[8, 12\]"),
        "blocks": (
            lambda f: edit(f / "config.json", up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
            "up_block_types=",
        ),
        "groups": (lambda f: edit(f / "config.json", norm_num_groups=3), "diffusers cannot build|norm_groups=3"),
        "scale": (lambda f: edit(f / "config.json", scaling_factor=-1.0), "scaling_factor=-1.0: must be"),
        "size": (
            lambda f: edit(f / "config.json", sample_size=[16, 8]),
            r"sample_size=\[16, 8\]: .* on squares",
        ),
        "negative size": (
            lambda f: edit(f / "config.json", sample_size=-16),
            "sample_size=-16: must be a whole",
        ),
        "uneven size": (lambda f: edit(f / "config.json", sample_size=15), "sample_size=15 does not divide by .* f=2"),
        "true scale": (lambda f: edit(f / "config.json", scaling_factor=True), "scaling_factor=True: must be a number"),
        "text shift": (lambda f: edit(f / "config.json", shift_factor="x"), "shift_factor='x': must be a number"),
        "no widths": (
            lambda f: edit(f / "config.json", block_out_channels=[0, 32]),
            r"diffusers cannot build|block_out_channels=\[0, 32\]: must be a list of whole numbers, at least 1",
        ),
        "endless": (lambda f: edit(f / "config.json", layers_per_block=10**9), "layers_per_block=1000000000: must be"),
        "huge": (lambda f: edit(f / "config.json", latent_channels=10**12), "latent_channels=1000000000000: must be"),
    }


def test_an_index_in_the_place_of_our_own_file_does_not_lead_to_itself(vae: Path) -> None:
    for places in ({"a": SAFETENSORS}, {"a": 5}, {"a": ["x"]}):
        (vae / SAFETENSORS).unlink(missing_ok=True)
        (vae / f"{SAFETENSORS}.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(CheckpointError, match=r"index\.json has no weight_map|safetensors is missing"):
            read_tensors(vae / SAFETENSORS)


def test_a_shard_with_more_than_the_index_places_is_refused(vae: Path) -> None:
    resave(vae, "sharded")
    index = vae / f"{SAFETENSORS}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    del places["quant_conv.bias"]
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"index\.json does not place quant_conv\.bias of diffusion"):
        tensors(vae)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("read", [read_checkpoint, lambda path: read_foreign_tensors(path.parent, DIFFUSERS_STEMS)])
def test_a_damaged_pickle_is_one_line(tmp_path: Path, is_zip: bool, read: Callable[[Path], dict[str, Tensor]]) -> None:
    """Whatever its reader fails in; what it holds is read or refused, and never run."""
    path = tmp_path / BIN
    torch.save({"a.weight": torch.ones(3, 4), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    rng, refused = np.random.default_rng(0), []
    for _ in range(150):
        if is_zip:
            with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as after:
                for name in before.namelist():
                    data = before.read(name)
                    after.writestr(name, mutate(data, whole, rng) if name.endswith("data.pkl") else data)
        else:
            path.write_bytes(mutate(whole, whole, rng))
        try:
            dict(read(path))
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not [message for message in refused if "\n" in message or "\x1b" in message]


@pytest.mark.parametrize("name", damages())
def test_what_cannot_be_read_is_one_line(vae: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = damages()[name]
    damage(vae)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_foreign_diffusers(vae)
    assert "\n" not in str(raised.value)
    assert "must never run" not in capsys.readouterr().out


def test_a_size_of_two_equal_sides_is_one(vae: Path) -> None:
    edit(vae / "config.json", sample_size=[32, 32])
    assert read_foreign_diffusers(vae).provenance["resolution"] == 32


def test_a_codebook_of_another_width_is_refused(tmp_path: Path) -> None:
    vq_model(vq_embed_dim=5).save_pretrained(tmp_path / "vq")
    with pytest.raises(CheckpointError, match="vq_embed_dim=5: the networks here compute what vq_embed_dim=3"):
        read_foreign_diffusers(tmp_path / "vq")
