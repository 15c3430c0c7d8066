"""Weights of other programs in every form that they come in, and what is refused, by name."""

from __future__ import annotations

import copy
import io
import json
import shutil
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

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, expected_autoencoder_tensors
from ldm_scale.interchange.compvis_file import read_checkpoint
from ldm_scale.interchange.diffusers_import import read_foreign_diffusers
from ldm_scale.interchange.diffusers_scheduler import read_scheduler
from ldm_scale.interchange.diffusers_unet import empty_unet
from ldm_scale.interchange.foreign_autoencoder import autoencoder_config_of, read_foreign_autoencoder
from ldm_scale.interchange.foreign_config import empty_model, filled
from ldm_scale.interchange.foreign_text import read_foreign_text
from ldm_scale.interchange.foreign_unet import read_foreign_unet, unet_config_of
from ldm_scale.interchange.foreign_weights import DIFFUSERS_STEMS, read_foreign_tensors
from ldm_scale.interchange.load import load_autoencoder
from ldm_scale.interchange.name_maps import autoencoder_names, restore, unet_names
from ldm_scale.interchange.safetensors_io import read_tensors
from ldm_scale.models.build import build_unet
from tests.helpers.foreign import (
    DDIM,
    OURS,
    SCALED_LINEAR,
    autoencoder_kl,
    byte_pairs,
    conditional_unet,
    edit,
    save,
    vq_model,
)
from tests.helpers.mutations import mutate

_diffusers: Any = diffusers
JUNK: tuple[Any, ...] = (None, -1, 0, "x", [], {}, True, float("nan"), [[]], 10**30, [0, 32])
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


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("sd1", tmp_path_factory.mktemp("sd1"))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "pipeline": (
        "model_index.json",
        {"_class_name": "StableDiffusionXLPipeline"},
        "'StableDiffusionXLPipeline': pipel",
    ),
    "part": ("model_index.json", {"unet": [None, None]}, r"unet=\[None, None\]: the pipeline has no such part"),
    "text class": ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "encoder T5EncoderModel"),
    "unet class": ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "'UNet3DConditionModel': UNets here"),
    "heads": (
        "unet/config.json",
        {"attention_head_dim": [8, 4, 8, 8]},
        r"attention_head_dim=\[8, 4, 8, 8\] with block",
    ),
    "depths": ("unet/config.json", {"transformer_layers_per_block": [1, 2, 1, 1]}, "transformer_layers_per_block="),
    "classes": ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds=10: the networks"),
    "kernel": ("unet/config.json", {"conv_in_kernel": 5}, "conv_in_kernel=5"),
    "cross": ("unet/config.json", {"only_cross_attention": True}, "only_cross_attention=True"),
    "eps": ("unet/config.json", {"norm_eps": 1e-6}, "norm_eps=1e-06: the networks here compute what norm_eps=1e-05"),
    "variances": ("unet/config.json", {"out_channels": 8}, "out_channels=8 with in_channels=4"),
    "middle": ("unet/config.json", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D'"),
    "betas": ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule='linear': the processes"),
    "table": ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 1000}, "trained_betas=a list of 1000"),
    "flow": (
        "scheduler/scheduler_config.json",
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "use_flow_sigmas=True: the processes here have use_flow_sigmas=False",
    ),
    "variances of its own": (
        "scheduler/scheduler_config.json",
        {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
        "variance_type='learned_range': the processes here have",
    ),
    "times of another kind": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        "timestep_type='continuous': the processes here have timestep_type='discrete'",
    ),
    "edm of v": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
        "prediction_type='v_prediction': the processes here have epsilon",
    ),
    "text for a number": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"),
    "scheduler": ("scheduler/scheduler_config.json", {"_class_name": "DDIMInverseScheduler"}, "DDIMInverseScheduler"),
    "no betas": ("scheduler/scheduler_config.json", {"beta_start": 0.5}, "must satisfy 0 < beta_start <= beta_end"),
    "activation": ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu': text encoders here have"),
    "mask": ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask=True"),
    "feed-forward": ("text_encoder/config.json", {"intermediate_size": 48}, "intermediate_size=48"),
    "shift": ("vae/config.json", {"shift_factor": 0.1}, r"shift_factor=0\.1: StableDiffusionPipeline does not shift"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_networks_cannot_hold_is_refused_by_its_key(sd1: Path, name: str) -> None:
    file, changes, message = REFUSED[name]
    before = (sd1 / file).read_text()
    edit(sd1 / file, **changes)
    try:
        with pytest.raises(CheckpointError, match=message) as raised:
            read_foreign_diffusers(sd1)
    finally:
        (sd1 / file).write_text(before)
    assert str(sd1) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_channels_that_no_pipeline_of_ours_gives_are_refused(sd1: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1, tmp_path / "sd1")
    conditional_unet(5, attention_head_dim=8).save_pretrained(tmp_path / "sd1" / "unet")
    with pytest.raises(
        CheckpointError, match=r"in_channels=5 with out_channels=4: .* gives its UNet 4; what the others"
    ):
        read_foreign_diffusers(tmp_path / "sd1")


def test_a_tokenizer_without_its_vocabulary_says_what_it_needs(tmp_path: Path) -> None:
    folder = save("text_to_image", tmp_path)
    (folder / "tokenizer" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer holds no vocab\.txt: save the tokenizer's vocabulary there"):
        read_foreign_diffusers(folder)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    folder = save("celebahq", tmp_path)
    (folder / "scheduler").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"scheduler is missing: the folder is incomplete"):
        read_foreign_diffusers(folder)
    with pytest.raises(CheckpointError, match="'UNet2DModel': alone, only AutoencoderKL and VQModel"):
        read_foreign_diffusers(folder / "unet")


def test_another_tokenizer_is_refused(sd1: Path) -> None:
    tokenizer = copy.deepcopy(byte_pairs("zero"))
    tokenizer.pad_token = "a</w>"
    saved = {path.name: path.read_bytes() for path in (sd1 / "tokenizer").iterdir()}
    tokenizer.save_pretrained(sd1 / "tokenizer")
    try:
        with pytest.raises(CheckpointError, match=r"tokenizer numbers '' as .*, the tokenizer here as"):
            read_foreign_diffusers(sd1)
    finally:
        for name, content in saved.items():
            (sd1 / "tokenizer" / name).write_bytes(content)


DRAWN_OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "DDIMScheduler": (
        {"steps_offset": 0, "timestep_spacing": "trailing"},
        "steps_offset=0 (here 1), timestep_spacing='trailing' (here 'leading')",
    ),
    "DPMSolverMultistepScheduler": (
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": True},
        "algorithm_type='sde-dpmsolver++' (here 'dpmsolver++'), solver_order=3 (here 2), timestep_spacing='linspace' "
        "(here 'leading'), use_karras_sigmas=True (here False)",
    ),
    "EulerAncestralDiscreteScheduler": (
        {"timestep_spacing": "leading"},
        "samples will differ from its own pipeline's by _class_name='EulerAncestralDiscreteScheduler' (here 'ddim', "
        "the nearest)",
    ),
    "DDPMScheduler": (
        {"clip_sample": False, "variance_type": "fixed_large", "clip_sample_range": 2.0},
        "by variance_type='fixed_large' (here 'fixed_small')",
    ),
    "EDMEulerScheduler": (
        {"prediction_type": "epsilon", "sigma_schedule": "exponential"},
        "by sigma_schedule='exponential' (here 'karras')",
    ),
}


@pytest.mark.parametrize("name", DRAWN_OTHERWISE)
def test_a_scheduler_that_draws_otherwise_is_said(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = type("Log", (), {"warning": lambda self, message: said.append(message)})()
    monkeypatch.setattr("ldm_scale.interchange.diffusers_scheduler.get_logger", lambda: log)
    scheduler = getattr(_diffusers, name)
    known = scheduler.__init__.__wrapped__.__code__.co_varnames
    common = {key: value for key, value in (SCALED_LINEAR | OURS).items() if key in known}
    changes, message = DRAWN_OTHERWISE[name]
    scheduler(**(common | changes)).save_pretrained(tmp_path)
    read_scheduler(tmp_path)
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_that_draws_as_ours_is_silent(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_scale.interchange.diffusers_scheduler.get_logger", lambda: pytest.fail("said something"))
    options = {
        "DDIMScheduler": DDIM,
        "PNDMScheduler": OURS | {"skip_prk_steps": True},
        "EulerDiscreteScheduler": {"steps_offset": 1, "timestep_spacing": "leading"},
    }
    getattr(_diffusers, name)(**SCALED_LINEAR, **options[name]).save_pretrained(tmp_path)
    assert read_scheduler(tmp_path)[1].sampler == {"PNDMScheduler": "plms"}.get(name, "ddim")


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler", "text_encoder"])
def test_whatever_a_configuration_says_is_used_or_refused(sd1: Path, part: str) -> None:
    """Each key with things that it may not hold; of the UNet, which takes longest to build, one a key."""
    path = sd1 / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    readers: dict[str, Callable[[Path], object]] = {
        "vae": read_foreign_autoencoder,
        "unet": read_foreign_unet,
        "scheduler": read_scheduler,
        "text_encoder": lambda folder: read_foreign_text(
            folder, "CLIPTextModel", sd1 / "nowhere", "CLIPTokenizer"
        ),  # refused there at the latest: opening a tokenizer takes a second
    }
    before, escaped, number = path.read_text(), {}, 0
    try:
        for key in json.loads(before):
            for _ in range(1 if part == "unet" else 3):
                number += 1
                path.write_text(json.dumps(json.loads(before) | {key: JUNK[number % len(JUNK)]}))
                try:
                    readers[part](path.parent)
                except CheckpointError:
                    continue
                except Exception as error:
                    escaped[key, repr(JUNK[number % len(JUNK)])] = f"{type(error).__name__}: {error}"
    finally:
        path.write_text(before)
    assert escaped == {}


# The published configurations of the UNets of Stable Diffusion 1.5 and 2.1.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "sd-1.5": ({"attention_head_dim": 8, "cross_attention_dim": 768}, 859_520_964),
    "sd-2.1": (
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96,
        },
        865_910_724,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_unets_has_a_place(tmp_path: Path, name: str) -> None:
    own, parameters = PUBLISHED[name]
    common = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(common | own))
    theirs, model = empty_model(_diffusers.UNet2DConditionModel, tmp_path)
    config = unet_config_of(tmp_path / "config.json", theirs, is_conditional=True)
    with torch.device("meta"):
        target = build_unet(config, 4, 4, own["cross_attention_dim"]).state_dict()
    ours = restore(model.state_dict(), unet_names(config), target, name)
    assert sum(x.numel() for x in ours.values()) == sum(x.numel() for x in target.values()) == parameters
    held: Any = empty_unet(config, 4, own["cross_attention_dim"], 64)
    assert filled(held, {}, tmp_path)["attention_head_dim"] in (8, (5, 10, 20, 20))


def test_the_published_autoencoder_and_celebahqs_unet_are_ours(tmp_path: Path) -> None:
    """Configurations in the old files of SD-1.5 (its vae) and of CompVis' ldm-celebahq-256 (its unet)."""
    vae = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(vae))
    theirs, model = empty_model(_diffusers.AutoencoderKL, tmp_path)
    config = autoencoder_config_of(tmp_path / "config.json", theirs, "AutoencoderKL")
    assert config == AutoencoderConfig()
    target = expected_autoencoder_tensors(config)
    assert sum(x.numel() for x in target.values()) == 83_653_863
    assert restore(model.state_dict(), autoencoder_names(config), target, "vae").keys() == target.keys()

    unet = {
        "_class_name": "UNet2DModel",
        "attention_head_dim": 32,
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 64,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    }
    (tmp_path / "config.json").write_text(json.dumps(unet))
    theirs, model = empty_model(_diffusers.UNet2DModel, tmp_path)
    of_unet = unet_config_of(tmp_path / "config.json", theirs, is_conditional=False)
    with torch.device("meta"):
        target = build_unet(of_unet, 3, 3, None).state_dict()
    # The paper's 274M (arXiv:2112.10752, Table 12).
    assert round(sum(x.numel() for x in target.values()) / 1e6, 1) == 274.1
    assert restore(model.state_dict(), unet_names(of_unet), target, "unet").keys() == target.keys()
