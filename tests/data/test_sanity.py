import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image

from lib.data import DataError, iterate_samples, load_samples
from lib.metrics import fill_unlabelled


def rewrite(folder, kind, change):
    for path in (folder / "train" / kind).iterdir():
        changed = change(np.asarray(Image.open(path)))
        if changed.dtype.kind == "f":
            np.save(path.with_suffix(".npy"), changed)
            path.unlink()
        else:
            Image.fromarray(changed).save(path)


def refusal(folder):
    """Return the error message, which is the same when streaming at native size."""
    with pytest.raises(DataError) as error:
        load_samples(folder, "train", "none", (24, 32))
    with pytest.raises(DataError, match=re.escape(str(error.value))):
        next(iter(iterate_samples(folder, "train", "none")))
    return str(error.value)


METRES, CENTIMETRES, TENTHS = (1000, "metres"), (10, "centimetres"), (0.1, "tenths of mm")
QUARTERS, FIFTHS = (0.25, "4000 units a metre"), (0.2, "5000 units a metre")


@pytest.mark.parametrize(
    ("change", "median", "units"),
    [
        (lambda depth: depth // 10, "310", [CENTIMETRES]),  # each frame alone could be a close-up
        (lambda depth: (depth / 1000).astype(np.float32), "3.107", [METRES]),
        (lambda depth: (depth / 1000).astype(np.float16), "3.10742", [METRES]),
        (lambda depth: 4 * depth, "12428", [QUARTERS, FIFTHS, TENTHS]),  # RealSense L515, Matterport3D
        (lambda depth: 5 * depth, "15535", [QUARTERS, FIFTHS, TENTHS]),
        (lambda depth: np.minimum(10 * depth.astype(int), 60000).astype(np.uint16), "31070", [TENTHS]),
        (lambda depth: depth // 3, "1035", []),  # close-range scenes or something else
        (lambda depth: depth / depth.max() / 100, "0.00", []),  # normalised
    ],
)
def test_error_suggests_units_for_implausible_depth(folder, scenes, change, median, units):
    rewrite(folder, "depth", change)
    yaml = folder / "dataset.yaml"
    lines = [f"`depth_unit_mm: {unit}` for {name}" for unit, name in units] + [
        "`depth_unit_mm: 1` if these are mm"
    ]
    found = refusal(folder)
    assert found.startswith(f"{folder}: the depth of split 'train' has the median {median}")
    assert found.endswith(
        f" in 12 files, expected 1250 to 5000 mm: write into {yaml} {' or '.join(lines)}. Depth that is not metric "
        "(disparity, relative, normalised) can't be used: leave it out with `folders: {image: image, label: label}`"
    )
    for unit, _ in units:
        yaml.write_text(f"depth_unit_mm: {unit}")
        assert len(load_samples(folder, "train", "none")) == 12  # a stated unit is not checked
    yaml.write_text("depth_unit_mm: 1")
    assert len(load_samples(folder, "train", "none")) == 12
    yaml.write_text("folders: {image: image, label: label}")
    assert load_samples(folder, "train", "none").depth is None


def test_error_suggests_depth_bits_for_sun_rgb_d(folder, scenes):
    """Above 8192 mm its bits are no multiples of 8."""
    far = np.where(np.arange(128) < 2, 9001, scenes.depth).astype(np.uint16)
    write_folder(folder, replace(scenes, depth=far << 3 | far >> 13))
    found = refusal(folder)
    assert (
        f" mm: write into {folder / 'dataset.yaml'} `depth_bits: sun` for SUN RGB-D or `depth_unit_mm: 0."
        in found
    )
    (folder / "dataset.yaml").write_text("depth_bits: sun")
    np.testing.assert_array_equal(load_samples(folder, "train", "none").depth, far)


def test_stated_missing_depth_is_not_measured(folder, scenes):
    """As 16-bit depth in metres, where 65535 marks missing depth, and as -1."""
    metres = np.where(scenes.depth == 0, np.float32(65.535), scenes.depth / np.float32(1000))
    for value, stated in (
        (metres, "[0, 65.535]"),
        (np.where(scenes.depth == 0, -1, scenes.depth / 1000), "[-1]"),
    ):
        for name, depth in zip(scenes.names, value, strict=True):
            (folder / "train" / "depth" / f"{name}.png").unlink(missing_ok=True)
            np.save(folder / "train" / "depth" / f"{name}.npy", depth)
        (folder / "dataset.yaml").write_text(f"depth_unit_mm: 1000\ndepth_missing: {stated}")
        np.testing.assert_array_equal(load_samples(folder, "train", "none").depth, scenes.depth)
    nothing = np.full(scenes.depth[0].shape, 65.535, np.float32)
    for path in (folder / "train" / "depth").iterdir():
        np.save(path, nothing)
    (folder / "dataset.yaml").write_text("depth_unit_mm: 1000\ndepth_missing: [65.535]")
    assert "the depth of split 'train' is missing everywhere in 12 files" in refusal(folder)


@pytest.mark.parametrize(
    ("factor", "unit", "within"), [(5, 0.2, 0), (4, 0.25, 0), (0.1, 10, 9), (0.001, 1000, 0)]
)
def test_depth_unit_mm_converts_depth_to_millimetres(folder, scenes, factor, unit, within):
    dtype = np.uint16 if factor > 0.01 else np.float32
    rewrite(folder, "depth", lambda depth: (depth * factor).astype(dtype))
    (folder / "dataset.yaml").write_text(f"depth_unit_mm: {unit}")
    depth = load_samples(folder, "train", "none").depth.astype(int)
    assert np.abs(depth - scenes.depth)[scenes.depth < 6000].max() <= within


def test_depth_that_is_missing_everywhere_is_rejected(folder):
    rewrite(folder, "depth", np.zeros_like)
    assert refusal(folder) == (
        f"{folder}: the depth of split 'train' is missing everywhere in 12 files; export it again, or leave it out: write "
        f"`folders: {{image: image, label: label}}` into {folder / 'dataset.yaml'}"
    )
    (folder / "dataset.yaml").write_text("folders: {image: image, label: label}")
    assert load_samples(folder, "train", "none").depth is None


def test_error_asks_whether_65535_marks_missing_depth(folder, scenes):
    rewrite(folder, "depth", lambda depth: np.where(depth == 0, 65535, depth).astype(np.uint16))
    share = f"{100 * (scenes.depth[:, ::4, ::4] == 0).mean():.0f} %"
    assert refusal(folder) == (
        f"{folder}: the depth of split 'train' is 65535 in {share} of the pixels, the largest 16-bit value. If it "
        f"marks missing depth, write `depth_missing: [0, 65535]` into {folder / 'dataset.yaml'}, otherwise write "
        "`depth_missing: [0]`"
    )
    (folder / "dataset.yaml").write_text("depth_missing: [0, 65535]")
    np.testing.assert_array_equal(load_samples(folder, "train", "none").depth, scenes.depth)


def test_error_suggests_first_label_if_labels_are_shifted(folder, scenes):
    """If the last class never occurs, no label value reveals the shift."""
    label = np.where(scenes.label == 12, 255, scenes.label)
    write_folder(folder, replace(scenes, label=label + np.uint8(1)))  # 255 becomes 0
    yaml = folder / "dataset.yaml"
    assert refusal(folder) == (
        f"{folder}: in the labels of split 'train' 0 separates nearly all other values, and 255 never occurs, as if 0 meant "
        f"unlabelled and classes began with 1. If so, write `first_label: 1` into {yaml}; if 0 is 'bed', write `first_label: 0`"
    )
    yaml.write_text("first_label: 1")
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, label)
    yaml.write_text("first_label: 0")
    assert (load_samples(folder, "train", "none").label == label + np.uint8(1)).all()


def test_error_for_shifted_labels_of_a_mapping_suggests_ignore(folder, scenes):
    """`first_label` is only for lists of classes."""
    label = np.where(scenes.label == 12, 255, scenes.label) + np.uint8(1)
    write_folder(folder, replace(scenes, label=label))
    yaml = folder / "dataset.yaml"
    names = [f"{index}: c{index}" for index in range(13)]
    yaml.write_text(f"classes: {{{', '.join(names)}}}")
    assert refusal(folder).endswith(
        f"If so, take 0 out of `classes` and write `ignore: [0, 255]` into {yaml}; if 0 is 'c0', write `ignore: [255]`"
    )
    yaml.write_text(f"classes: {{{', '.join(names[1:])}}}\nignore: [0, 255]")
    expected = np.where(label == 0, 255, label - np.uint8(1))
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, expected)
    yaml.write_text(f"classes: {{{', '.join(names)}}}\nignore: [255]")
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, label)


def test_null_colours_do_not_switch_checks_off(folder, scenes):
    write_labels(folder, halves(scenes, 0, 255))
    (folder / "dataset.yaml").write_text("colours: null\nclasses: [background, object]")
    assert "binary masks" in refusal(folder)


@pytest.mark.parametrize("first", ["wall", "Background"])
def test_complete_labels_are_not_mistaken_for_shifted_ones(folder, scenes, first):
    """Class 0 may be the wall behind most objects, or may be called background."""
    label = np.stack([fill_unlabelled(label) for label in scenes.label])
    label = np.where(label == 11, 0, label % 11 + 1) if first == "wall" else label % 2 * (scenes.label != 255)
    (folder / "dataset.yaml").write_text(
        f"classes: [{first}, {', '.join(f'c{index}' for index in range(12))}]"
    )
    write_folder(folder, replace(scenes, label=label.astype(np.uint8)))
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, label)


def test_split_without_labelled_pixels_is_rejected(folder, scenes):
    nothing = np.full_like(scenes.label, 255)
    nothing[1] = scenes.label[1]  # a training image with validation random
    write_folder(folder, replace(scenes, label=nothing))
    assert len(load_samples(folder, "train", "random")) == 9
    with pytest.raises(DataError) as error:
        load_samples(folder, "valid", "random")
    assert str(error.value) == (
        f"{folder}: no pixel is labelled in the 3 images of split 'valid' (validation random); check the labels, `ignore` in "
        "DATA/dataset.yaml and limit"
    )


# binary masks


BINARY = (
    "{folder}: the labels of split 'train' contain only {value} ({name}) and 255, which means unlabelled by default. If these "
    "are binary masks, write `classes: {{{value}: background, 255: object}}` and `ignore: []` into {yaml}; if 255 means "
    "unlabelled, write `ignore: [255]`"
)


def write_labels(folder, labels, palette=None):
    for path, label in zip(sorted((folder / "train" / "label").iterdir()), labels, strict=True):
        mask = Image.fromarray(label.astype(np.uint8))
        if palette is not None:
            mask.putpalette(palette)
        mask.save(path)


def halves(scenes, one, other):
    """Masks with one value on the left and another on the right."""
    label = np.full_like(scenes.label, one)
    label[:, :, 60:] = other
    return label


@pytest.mark.parametrize(
    ("values", "palette", "text"),
    [
        ((0, 255), None, "classes: [background, object]"),
        ((0, 255), None, ""),  # class names of NYUv2
        ((0, 1), [0, 0, 0, 255, 255, 255], "classes: [background, object]"),  # black and white
        ((1, 255), None, "classes: {0: a, 1: b, 2: c}"),
        ((0, 255), None, "classes: [background, object]\nfirst_label: 0"),
    ],
)
def test_error_for_binary_masks_gives_the_yaml_to_read_them(folder, scenes, values, palette, text):
    yaml = folder / "dataset.yaml"
    yaml.write_text(text)
    write_labels(folder, halves(scenes, *values), palette)
    value = values[0]
    name = "b" if value else ("bed" if not text else "background")
    assert refusal(folder) == BINARY.format(folder=folder, yaml=yaml, value=value, name=name)
    yaml.write_text(f"classes: {{{value}: background, 255: object}}\nignore: []")
    samples = load_samples(folder, "train", "none")
    np.testing.assert_array_equal(samples.label, halves(scenes, 0, 1))
    yaml.write_text("ignore: [255]")  # a stated value is not checked
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, halves(scenes, value, 255))


def test_masks_with_more_classes_or_without_255_are_not_binary(folder, scenes):
    """As in VOC with its borders of 255, one class is absent and another occurs in only one file."""
    (folder / "dataset.yaml").write_text("classes: [background, cat, dog]")
    label = halves(scenes, 0, 255)
    label[7, :4] = 1
    write_labels(folder, label)
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, label)
    write_labels(folder, halves(scenes, 0, 0))
    assert (load_samples(folder, "train", "none").label == 0).all()


def test_binary_mask_check_reads_every_file(tmp_path, scenes):
    """The only file with a second class is not in the sample of files."""
    many = scenes[np.arange(120) % 12]
    label = np.zeros_like(many.label)
    label[:, :, 60:] = 255
    label[1, :4] = 1  # of the 120 files, 50 are sampled, but not this one
    names = np.array([f"{number:06d}" for number in range(120)])
    write_folder(tmp_path, replace(many, names=names, label=label))
    (tmp_path / "dataset.yaml").write_text("classes: [background, cat]")
    assert len(load_samples(tmp_path, "train", "none", (24, 32))) == 120


def test_labels_of_a_test_split_may_all_be_255(folder, scenes):
    write_folder(folder, replace(scenes[:3], label=np.full_like(scenes.label[:3], 255)), "test")
    test = load_samples(folder, "test")
    assert (test.label == 255).all()


def test_error_lists_all_label_values_without_a_class(folder, scenes):
    label = halves(scenes, 0, 1)
    for index in range(12):
        label[index, :8, :16] = 40 + index
    write_labels(folder, label)
    yaml = folder / "dataset.yaml"
    yaml.write_text("classes: [a, b]")
    found = refusal(folder)
    values = list(range(40, 52))
    share = 8 * 16 / label.size
    listed = ", ".join(f"{value}: {100 * share:.2f} %" for value in values)
    assert found == (
        f"{folder / 'train' / 'label' / '000000.png'}: label values {values}, expected 0..1 and 255 = unlabelled; list other "
        f"classes under `classes`, and unlabelled values under `ignore`, in {yaml}; `ignore: others` treats all values "
        f"without a class as unlabelled. Shares of the pixels in 12 files: {listed}"
    )
    yaml.write_text("classes: [a, b]\nignore: others")
    expected = np.where(label < 2, label, 255)
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, expected)
    yaml.write_text(f"classes: [a, b]\nignore: {values}")
    np.testing.assert_array_equal(load_samples(folder, "train", "none").label, expected)


def test_error_truncates_long_lists_of_label_values(folder, scenes):
    label = np.arange(96 * 128).reshape(96, 128) % 700
    for path in sorted((folder / "train" / "label").iterdir()):
        Image.fromarray(label.astype(np.uint16)).save(path)
    found = refusal(folder)
    assert "label values [13, 14, 15," in found
    assert found.endswith(" ...")
    assert len(found) < 10_000
