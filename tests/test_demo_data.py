"""The demo's data: composing, reading, augmenting, and AP on known detections."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pycocotools")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from kdops.integrations.pytorch.demo import augment, compose, data, evaluate  # noqa: E402

WHAT = compose.Composition(train_images=5, val_images=6, image_size=96, digit_height=(12.0, 32.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("composed") / "set"
    compose.compose(path, WHAT)
    return path


def test_same_seed_gives_the_same_set(folder, tmp_path):
    first = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert compose.compose(tmp_path / "again", WHAT)["sha256"] == first
    for file in sorted(folder.rglob("*.png")) + sorted(folder.rglob("instances_*.json")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(folder)).read_bytes()
    other = compose.Composition(**{**WHAT.__dict__, "seed": 1})
    assert compose.compose(tmp_path / "other", other)["sha256"] != first


def test_composed_set_is_kept_and_never_overwritten(folder, tmp_path):
    stamp = (folder / "val" / "000000.png").stat().st_mtime_ns
    assert compose.compose(folder, WHAT)["composition"]["val_images"] == 6
    assert (folder / "val" / "000000.png").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="holds a set made with other settings"):
        compose.compose(folder, compose.Composition())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and has no manifest.json"):
        compose.compose(tmp_path, WHAT)


def test_boxes_fit_the_digits(folder):
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    assert len(content["images"]) == 5 and len(content["annotations"]) > 15
    assert {a["image_id"] for a in content["annotations"]} == {1, 2, 3, 4, 5}
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x and 0 <= y and x + width <= 96 and y + height <= 96
        assert 6 <= height <= 32
        assert 1 <= annotation["category_id"] <= 10
    assert compose.TRAIN_SCANS.stop == compose.VAL_SCANS.start
    assert not set(compose.TRAIN_PHOTOGRAPHS) & set(compose.VAL_PHOTOGRAPHS)


def perfect(split):
    found = []
    for index in range(len(split)):
        _, target = split[index]
        boxes = target["boxes"] / split.scale(index)
        found.append({"boxes": boxes, "labels": target["labels"], "scores": torch.ones(len(boxes))})
    return found


def test_perfect_detections_have_ap_100(folder):
    split = data.CocoFolder(folder, "val", 128, augment=False)  # enlarged, so that the way back is tested as well
    figures = evaluate.average_precision(split, perfect(split))
    assert figures["AP"] == pytest.approx(100.0) and figures["AP75"] == pytest.approx(100.0)
    assert all(value is None or value == pytest.approx(100.0) for value in figures["per_class"].values())
    assert any(value is not None for value in figures["per_class"].values())


def test_ap_falls_with_wrong_labels_and_shifted_boxes(folder):
    split = data.CocoFolder(folder, "val", 96, augment=False)
    wrong = [{**f, "labels": f["labels"] % 10 + 1} for f in perfect(split)]
    shifted = [{**f, "boxes": f["boxes"] + 3} for f in perfect(split)]
    assert evaluate.average_precision(split, wrong)["AP"] < 5
    assert 0 < evaluate.average_precision(split, shifted)["AP"] < 90
    none = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}] * 6
    assert evaluate.average_precision(split, none)["AP"] == 0
    with pytest.raises(ValueError, match="6 images need as many detections, got 1"):
        evaluate.average_precision(split, none[:1])


def test_augmentation_depends_on_seed_epoch_and_index_only(folder):
    def sample(epoch, mosaic):
        split = data.CocoFolder(folder, "train", 96, augment=True, seed=3)
        split.epoch, split.mosaic = epoch, mosaic
        return split[2]

    for mosaic in (False, True):
        (image, target), (again, _) = sample(1, mosaic), sample(1, mosaic)
        assert image.shape == (3, 96, 96) and image.dtype == torch.float32
        assert torch.equal(image, again)
        assert len(target["boxes"]) == len(target["labels"]) > 0
        assert not torch.equal(image, sample(2, mosaic)[0])
    assert not torch.equal(sample(1, False)[0], sample(1, True)[0])


def marked(side, box):
    """A black image with a white box, and the box."""
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 255
    return pixels, np.array([box], dtype=np.float32), np.array([7])


@pytest.mark.parametrize("seed", range(5))
def test_boxes_follow_the_pixels(seed):
    rng = np.random.default_rng(seed)
    crop = augment.random_crop_resize(rng, marked(80, (30, 36, 44, 52)), (80, 80), (1.0, 1.5), visible=0.99)
    four = augment.mosaic(rng, lambda index: marked(80, (30, 36, 44, 52)), [0, 1, 2, 3], 80)
    mirrored = augment.flip(marked(80, (10, 20, 30, 50)))
    found = 0
    for pixels, boxes, _ in (crop, four, mirrored):
        assert pixels.shape == (80, 80, 3)
        for x1, y1, x2, y2 in boxes:
            inside = pixels[round(y1) + 2 : round(y2) - 2, round(x1) + 2 : round(x2) - 2]
            assert inside.size > 0 and inside.min() > 200
            found += 1
        outside = pixels.copy()
        for x1, y1, x2, y2 in boxes:
            outside[max(0, round(y1) - 2) : round(y2) + 2, max(0, round(x1) - 2) : round(x2) + 2] = 0
        if pixels is not four[0]:  # a mosaic may cut an object so far that its box is dropped
            assert outside.max() < 60
    assert found >= 2


def test_mosaic_wants_four():
    with pytest.raises(ValueError, match="takes 4 indices, got 3"):
        augment.mosaic(np.random.default_rng(0), lambda index: marked(8, (1, 1, 5, 5)), [0, 1, 2], 8)


def test_own_data_in_coco_layout(tmp_path):
    """COCO's file names, category ids with gaps, a crowd, an empty image, and images that are not square."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (120, 60), (200, 10, 10)).save(tmp_path / "val2017" / name)
    box = {"image_id": 9, "bbox": [20, 10, 40, 30], "area": 1200}
    content = {
        "images": [{"id": 9, "file_name": "a.jpg", "width": 120, "height": 60}]
        + [{"id": 11, "file_name": "b.jpg", "width": 120, "height": 60}],
        "annotations": [
            {**box, "id": 1, "category_id": 44, "iscrowd": 0},
            {**box, "id": 2, "category_id": 3, "iscrowd": 1},
        ],
        "categories": [{"id": 44, "name": "bottle"}, {"id": 3, "name": "car"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    split = data.CocoFolder(tmp_path, "val", 60, augment=False)
    assert split.class_names == ["car", "bottle"]
    image, target = split[0]
    assert image.shape == (3, 60, 60)
    assert target["boxes"].tolist() == [[10, 5, 30, 20]] and target["labels"].tolist() == [2]
    assert split[1][1]["boxes"].shape == (0, 4)
    assert evaluate.average_precision(split, perfect(split))["AP"] == pytest.approx(100.0)
    with pytest.raises(FileNotFoundError, match="no train data: looked for .*train2017"):
        data.CocoFolder(tmp_path, "train", 60, augment=False)
