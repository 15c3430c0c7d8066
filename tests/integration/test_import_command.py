"""`ldm-scale export --to compvis` and `ldm-scale import` as a user types them; what was imported is trained on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import open_clip
import pytest
import torch

from ldm_scale import load_autoencoder, load_diffusion
from ldm_scale.__main__ import main
from ldm_scale.config.schema import ConditioningConfig, TextConditioningConfig
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.artifact import DiffusionArtifact, read_diffusion_artifact, write_diffusion_artifact
from ldm_scale.interchange.compvis import ImportOptions, read_compvis
from ldm_scale.interchange.compvis_write import fill_compvis_folder
from ldm_scale.interchange.load import read_source
from ldm_scale.interchange.publish import publish
from tests.helpers import foreign
from tests.helpers.commands import stage2
from tests.helpers.compvis import (
    BERT,
    KINDS,
    SELF,
    TEXT_KINDS,
    UNET,
    first_stage,
    second_stage,
    theirs,
    write_vocabulary,
)
from tests.helpers.disks import full_disk
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import make_dataset
from tests.helpers.towers import tiny_tower

CAPTIONS = ["a red apple", ""]


def there_and_back(tmp_path: Path, ours: DiffusionArtifact, capsys: pytest.CaptureFixture[str]) -> DiffusionArtifact:
    """What comes back from `ours` by the YAML alone."""
    write_diffusion_artifact(tmp_path / "ours", ours)
    assert main(["export", str(tmp_path / "ours"), "--to", "compvis", "--out", str(tmp_path / "theirs")]) == 0
    assert "compvis" in capsys.readouterr().out
    assert read_source(tmp_path / "theirs").content_hash == ours.content_hash
    (tmp_path / "theirs" / "ldm_scale.json").unlink()
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "back"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["path"], report["kind"], report["weights"]) == (str(tmp_path / "back"), "diffusion", "raw")
    assert set(report["differences"].values()) == {0.0}
    back = read_diffusion_artifact(tmp_path / "back")
    assert back.content_hash == report["content_sha256"]
    assert "imported from: model.ckpt (compvis)" in (tmp_path / "back" / "README.md").read_text()
    assert [name for name, tensor in ours.state.items() if not torch.equal(tensor, back.state[name])] == []
    return back


@pytest.mark.parametrize("name", TEXT_KINDS)
def test_clip(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = second_stage(*TEXT_KINDS[name])
    back = there_and_back(tmp_path, ours, capsys)
    assert (back.unet, back.conditioning.text) == (ours.unet, ours.conditioning.text)
    weight = theirs(tmp_path / "theirs" / "model.ckpt")["model.diffusion_model.input_blocks.0.0.weight"]
    if name == "text and inpainting":
        # Theirs: latents, mask, masked image. Ours has the mask behind.
        here = ours.state["unet.conv_in.weight"]
        assert torch.equal(weight[:, 4], here[:, 8])
        assert torch.equal(weight[:, 5:], here[:, 4:8])
        return
    images = load_diffusion(tmp_path / "back").sample(CAPTIONS, seeds=[0, 1], num_steps=2)
    assert torch.equal(
        images, load_diffusion(tmp_path / "ours").sample(CAPTIONS, seeds=[0, 1], num_steps=2, guidance_scale=7.5)
    )


def test_open_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tower(tmp_path)
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny-frozen-text"])
    text = TextConditioningConfig(padding="zero", max_tokens=9, width=16, depth=2, num_heads=2)
    ours = second_stage(UNET, ConditioningConfig(text=text))
    back = there_and_back(tmp_path, ours, capsys)
    assert back.conditioning.text == text
    left_out = back.provenance["imported"]["left_out"]
    assert left_out["the block behind the text encoder's penultimate layer"] == 12


def test_a_frozen_tower(tmp_path: Path) -> None:
    frozen = tiny_tower(tmp_path)
    ours = second_stage(UNET, ConditioningConfig(frozen_text=frozen))
    published = publish(ours, "compvis", tmp_path / "theirs")
    assert published.differences["text encoder"] < 1e-5
    assert read_source(tmp_path / "theirs").content_hash == ours.content_hash
    (tmp_path / "theirs" / "ldm_scale.json").unlink()
    back = read_compvis(tmp_path / "theirs", ImportOptions()).artifact
    assert isinstance(back, DiffusionArtifact)
    assert back.conditioning.text is not None
    assert (back.conditioning.text.padding, back.conditioning.text.depth) == ("zero", 2)
    (tmp_path / "weights.pt").unlink()
    with pytest.raises(ConfigError, match="weights"):
        publish(ours, "compvis", tmp_path / "out")


def test_bert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dataclasses.replace(BERT, vocabulary=write_vocabulary(tmp_path / "vocab.txt"))
    ours = second_stage(UNET, ConditioningConfig(text=text))
    back = there_and_back(tmp_path, ours, capsys)
    assert back.conditioning.text is not None
    assert dataclasses.replace(back.conditioning.text, vocabulary=text.vocabulary) == text
    assert back.content["conditioning"]["text"]["vocabulary"] == "vocab.txt", "no path of this machine"
    (tmp_path / "theirs" / "vocab.txt").unlink()
    arguments = ["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "again")]
    assert main(arguments) == 4
    assert "give its vocab.txt with --vocabulary" in capsys.readouterr().err
    assert main([*arguments, "--vocabulary", str(tmp_path / "vocab.txt")]) == 0
    (tmp_path / "few.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    assert main([*arguments, "--vocabulary", str(tmp_path / "few.txt")]) == 4
    assert "the 30522 words of bert-base-uncased" in capsys.readouterr().err


def test_an_imported_autoencoder_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zoo").mkdir()
    fill_compvis_folder(tmp_path / "zoo", first_stage())
    artifact = tmp_path / "artifact"
    arguments = ["import", str(tmp_path / "zoo" / "model.ckpt"), "--out", str(artifact), "--scale-factor", "0.5"]
    assert main(arguments) == 0
    assert load_autoencoder(artifact).latent_statistics.scale == 0.5
    make_dataset(tmp_path / "data", num_samples=16, samples_per_shard=16, resolution=20)
    same = ["autoencoder.base_channels=32", "autoencoder.latent_channels=4", "autoencoder.norm_groups=32"]
    more = ["autoencoder.num_res_blocks=1", "train.total_images=8", "optimizer.warmup_images=0", "data.num_workers=0"]
    assert run_ranks(main, 1, ["train", *stage2(tmp_path, tmp_path / "run", *same, *more)]) == [0]
    model = read_source(tmp_path / "run")
    assert isinstance(model, DiffusionArtifact)
    assert model.autoencoder.provenance["imported"]["from"] == "model.ckpt"


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zoo").mkdir()
    fill_compvis_folder(tmp_path / "zoo", second_stage(SELF, ConditioningConfig()))
    path, out = str(tmp_path / "zoo" / "model.ckpt"), tmp_path / "out"
    for arguments, message in (
        ([str(tmp_path / "none.ckpt"), "--out", str(out)], "none.ckpt is no file: give a checkpoint"),
        ([path, "--out", str(out), "--config", "none.yaml"], "none.yaml is no file: give the YAML"),
        ([path, "--out", str(out), "--weights", "ema"], "give --weights raw"),
        ([path, "--out", str(tmp_path / "zoo")], "holds files that this command did not write"),
    ):
        assert main(["import", *arguments]) == 4
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err.splitlines()[-1]
    with pytest.raises(SystemExit):
        main(["import", path, "--out", str(out), "--scale-factor", "0"])
    assert "0: must be above 0 and finite" in capsys.readouterr().err
    with full_disk(100_000):
        assert main(["import", path, "--out", str(out)]) in (1, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["zoo"]
    assert main(["import", path, "--out", str(out)]) == 0
    assert main(["import", path, "--out", str(out)]) == 0, "an earlier import is replaced"
    assert "left out: 2 tensors, the schedule" in capsys.readouterr().out


def test_an_export_of_what_theirs_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet, conditioning = KINDS["classes"]
    ours = second_stage(dataclasses.replace(unet, norm_groups=8), conditioning)
    write_diffusion_artifact(tmp_path / "ours", ours)
    assert main(["export", str(tmp_path / "ours"), "--to", "compvis", "--out", str(tmp_path / "theirs")]) == 4
    assert "unet.norm_groups=8" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


def test_folders_of_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, out = foreign.save("sd1", tmp_path / "theirs"), tmp_path / "out"
    arguments = ["import", str(theirs), "--out", str(out)]
    assert main([*arguments, "--scale-factor", "0.5"]) == 2
    assert "--scale-factor 0.5" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["weights"], report["left_out"]) == ("diffusion", "imported", {})
    assert set(report["differences"].values()) == {0.0}
    assert read_diffusion_artifact(out).content_hash == read_source(theirs).content_hash
    assert "imported from: StableDiffusionPipeline (diffusers" in (out / "README.md").read_text()
    assert main(["import", str(theirs / "vae"), "--out", str(tmp_path / "vae")]) == 0
    assert load_autoencoder(tmp_path / "vae").content_hash == load_autoencoder(out).content_hash
