"""All tools use one image reader and see the same upright pixels of a file."""

import numpy as np
import pytest
from conftest import tiny_cfg
from PIL import ExifTags, Image, PngImagePlugin

from fgbg_kd.data import NamingMapper
from fgbg_kd.data.image_files import check_images
from fgbg_kd.data.images import pick, read_image
from fgbg_kd.utils.errors import DataError

Image.init()
# Formats that Pillow can both write and read.
FORMATS = sorted(set(Image.SAVE) & set(Image.OPEN))


def picture() -> Image.Image:
    """Four areas of different brightness, so that each orientation looks different."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32] = 250, 170, 90
    return Image.fromarray(pixels)


# From the stored pixels to the upright image, for each orientation (EXIF 2.3, 4.6.4).
VIEWS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def save(path, kind: str, orientation: int) -> bool:
    """Returns False if this Pillow cannot write and read such a file with 8 bits."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for mode in ("RGB", "P", "L", "1"):
        try:
            picture().convert(mode).save(path, kind, exif=exif)
            with Image.open(path) as image:
                image.load()
                return image.mode[0] not in "IF"
        except Exception:  # a mode or a size that the format does not have, or a missing codec
            continue
    return False


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow warns about old formats
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.slow
def test_every_reader_sees_the_same_upright_pixels_in_all_orientations(kind, tmp_path):
    mapper = NamingMapper(tiny_cfg(), False)
    mapper.augmentations.augs.clear()
    path = tmp_path / f"image.{kind.lower()}"
    if not save(path, kind, 6):
        pytest.skip(f"Pillow here does not write and read {kind}, or not in 8 bits")
    stores_it = read_image(path, "RGB").shape == (64, 48, 3)
    assert stores_it or kind not in ("AVIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
    for orientation, view in VIEWS.items():
        save(path, kind, orientation)
        image = read_image(path, "BGR")
        seen = mapper({"file_name": str(path)})["image"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(image, seen)
        entry = {"file_name": path.name, "height": image.shape[0], "width": image.shape[1]}
        check_images([entry], str(tmp_path))  # reads only the header
        if stores_it:
            expected = view(np.asarray(picture()).astype(int))
            assert image.shape == expected.shape
            assert np.abs(image - expected).mean() < 12  # error of compression


def test_orders_differ_in_their_channels_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png", "RGB"), pixels)
    assert np.array_equal(read_image(tmp_path / "x.png", "BGR"), pixels[:, :, ::-1])
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(read_image(tmp_path / "x.png", "L"), grey[:, :, None])


def test_what_cannot_be_read_is_named_with_a_way_out(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(path)
    with pytest.raises(DataError, match="more than 8 bits .*convert it to 8 bits"):
        read_image(path, "RGB")
    picture().save(path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(DataError, match=r"too large.* --import large_images.py"):
            read_image(path, "RGB")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="x.png is damaged"):
        read_image(path, "RGB")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png", "RGB")


def test_a_choice_of_images_is_spread_over_those_with_objects():
    box = {"iscrowd": 0}
    records = [{"n": i, "annotations": [box] if i % 2 else [{"iscrowd": 1}]} for i in range(9)]
    assert [r["n"] for r in pick(records, 3)] == [1, 3, 7]
    assert [r["n"] for r in pick(records[:1], 3)] == [0]


@pytest.mark.parametrize("orientation", VIEWS)
def test_an_orientation_in_xmp_is_seen_by_all_readers_alike(orientation, tmp_path):
    """Some editors write the orientation of a PNG into XMP alone."""
    about = PngImagePlugin.PngInfo()
    text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"></x:xmpmeta>'
    about.add_itxt("XML:com.adobe.xmp", text)
    picture().save(tmp_path / "image.png", pnginfo=about)
    image = read_image(tmp_path / "image.png", "RGB")
    entry = {"file_name": "image.png", "height": image.shape[0], "width": image.shape[1]}
    check_images([entry], str(tmp_path))
    np.testing.assert_array_equal(image, VIEWS[orientation](np.asarray(picture())))
