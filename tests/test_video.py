"""Video decoding and preprocessing, against linear decodes, odd files and the published processor's
output."""

import gc
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from nanosport import image as image_module
from nanosport import media
from nanosport import video as V
from nanosport.image import ImageConfig, encode_jpeg, encode_png, preprocess, smart_resize
from nanosport.video import Video, VideoError
from tests.helpers.clips import image, number_in, numbered, write

SHARED = Path(__file__).parents[2] / "shared" / "data"
REJECTED = "audio_only audio_with_cover_art encrypted_cenc git_lfs_pointer html_404_page random_bytes truncated_no_moov"
REJECTED = set(f"{REJECTED} zero_bytes zero_frames".split())
WHY = {
    "audio_only.mp4": "no video stream",
    "audio_with_cover_art.mp3": "attached picture",
    "encrypted_cenc.mp4": "encrypted",
    "git_lfs_pointer.mp4": "LFS pointer",
    "html_404_page.mp4": "HTML page",
    "truncated_no_moov.mp4": "moov",
    "zero_bytes.mp4": "empty file",
}


def shared(name: str) -> list[dict]:
    file = SHARED / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else []


FILES = [(f"hard/{c['file']}", c["frames_decoded"]) for c in shared("hard")]
FILES += [(c["file"], c["nb_frames_decoded"]) for c in shared("clips")]
needs_shared = pytest.mark.skipif(not FILES, reason=f"{SHARED} is not here")


def linear(path: Path, keep: set[int]) -> tuple[int, dict]:
    """How many frames a plain decode gives, and those of index in `keep`."""
    kept, n = {}, 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                for frame in packet.decode():
                    if n in keep:
                        kept[n] = frame
                    n += 1
            except av.FFmpegError:
                pass
    return n, kept


def shown(frame, like: Video) -> torch.Tensor:
    """An av frame in the video's size, rotated by hand."""
    swap = frame.rotation % 180 != 0
    width, height = (like.height, like.width) if swap else (like.width, like.height)
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
    return torch.from_numpy(np.rot90(rgb, frame.rotation // 90).copy()).permute(2, 0, 1)


@needs_shared
@pytest.mark.parametrize("name,num", FILES or [("-", 0)])
def test_every_shared_file(name, num):
    path = SHARED / name
    if path.stem in REJECTED:
        with pytest.raises(VideoError) as error:
            Video(path, backend="pyav")
        message = str(error.value)
        assert (
            message.startswith(f"{path}: ")
            and "\n" not in message
            and WHY.get(path.name, "") in message
        )
        return
    video = Video(path, backend="pyav")
    assert (
        video.num_frames == len(video.times_s) == num
        and video.times_s[0] == 0
        and (np.diff(video.times_s) > 0).all()
    )
    assert video.height * video.width <= V.MAX_PIXELS
    wanted = [num - 1, 0, num // 2]
    frames = video.frames(wanted)
    assert frames.shape == (3, 3, video.height, video.width) and frames.dtype == torch.uint8
    count, truth = linear(path, set(wanted))
    assert count == num
    for i, frame in zip(wanted, frames, strict=True):
        assert torch.equal(frame, shown(truth[i], video)), f"frame {i} is not the linear decode's"
    with pytest.raises(VideoError, match="out of range"):
        video.frames([num])
    patches, grids = preprocess(frames[:1], ImageConfig(max_pixels=28 * 28 * 64))
    assert patches.isfinite().all() and len(patches) == grids[0][1] * grids[0][2]


@needs_shared
@pytest.mark.parametrize(
    "name,width,height",
    [
        ("rotated_meta_90", 256, 340),
        ("anamorphic_sar16_9", 853, 480),
        ("huge_8192x4320_3f", 1990, 1048),
    ],
)
def test_shown_size(name, width, height):
    video = Video(SHARED / "hard" / f"{name}.mp4")
    assert (video.width, video.height) == (width, height)


BACKENDS_AGREE = """
import sys, av, torch  # av first: its libraries then find each other
from nanosport.media import torchcodec
from nanosport.video import Video
if torchcodec() is None:
    print("skip") or sys.exit()
served = 0
for path in sys.argv[1:]:
    ours, theirs = Video(path, backend="pyav"), Video(path, backend="torchcodec")
    n = ours.num_frames
    wanted = [n - 1, 0, n // 3, n // 2, 0]
    assert torch.equal(ours.frames(wanted), theirs.frames(wanted)), path
    assert (ours.times_s == theirs.times_s).all() and n == theirs.num_frames, path
    served += theirs.backend == "torchcodec"
print("served", served)
"""


def test_torchcodec_gives_the_same_frames(tmp_path):
    """In a process of its own: where the machine has no FFmpeg, torchcodec is given PyAV's under
    the plain names."""
    libs = tmp_path / "libs"
    libs.mkdir()
    for lib in (Path(av.__file__).parents[1] / "av.libs").glob("lib[as][vw]*-*.so.*"):
        stem, version = lib.name.split("-")[0], lib.name.split(".so.")[1].split(".")[0]
        (libs / f"{stem}.so.{version}").symlink_to(lib)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    if media.torchcodec() is None:
        env["LD_LIBRARY_PATH"] = f"{libs}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    paths = [
        write(tmp_path / "a.mp4"),
        write(tmp_path / "odd.mp4", height=49, width=63, pix_fmt="yuv444p"),
    ]
    paths += [write(tmp_path / "vfr.mp4", times=[n * n * 10 for n in range(40)])]
    names = "rotated_meta_90.mp4 vfr_random_vp9.webm piped_no_duration.webm starts_mid_gop.ts hevc_10bit.mp4 vp8.webm"
    paths += [SHARED / "hard" / name for name in names.split() if FILES]
    run = subprocess.run(
        [sys.executable, "-c", BACKENDS_AGREE, *map(str, paths)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    if run.stdout.startswith("skip"):
        pytest.skip("torchcodec does not load, even with PyAV's FFmpeg libraries")
    assert int(run.stdout.split()[1]) == 3 + 3 * bool(FILES)


@pytest.mark.parametrize("suffix,gop", [(".mp4", 10), (".mkv", 7), (".ts", 10), (".mp4", 100)])
def test_every_frame_equals_the_linear_decode(tmp_path, suffix, gop):
    path = write(tmp_path / f"100% a:b{suffix}", gop=gop)
    video = Video(path, backend="pyav")
    count, truth = linear(path, set(range(40)))
    assert video.num_frames == count == 40 and video.fps == pytest.approx(10)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist() + [3, 3]
    for i, frame in zip(order, video.frames(order), strict=True):
        assert torch.equal(frame, shown(truth[i], video)), i
    for i in (0, 9, 10, 11, 39):
        assert torch.equal(video.frames([i])[0], shown(truth[i], video)), i


@pytest.mark.parametrize("cut", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_a_file_cut_short_promises_only_what_decodes(tmp_path, suffix, cut):
    path = write(tmp_path / f"whole{suffix}", height=240, width=320)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    count, truth = linear(path, set(range(40)))
    video = Video(path, backend="pyav")
    assert 0 < video.num_frames == count <= 40
    assert torch.equal(video.frames([count - 1])[0], shown(truth[count - 1], video))


def test_a_damaged_middle_is_survived(tmp_path):
    path = write(tmp_path / "a.mp4", height=240, width=320, gop=20)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    video = Video(path, backend="pyav")
    assert video.frames(range(video.num_frames)).shape[0] == video.num_frames


def test_one_frame_and_odd_size(tmp_path):
    video = Video(write(tmp_path / "a.mp4", num=1, height=49, width=63, pix_fmt="yuv444p"))
    assert (video.num_frames, video.height, video.width) == (1, 49, 63) and video.sample(8) == (0,)
    patches_PC, grids = preprocess(video.frames((0, 0)), ImageConfig())
    assert patches_PC.shape == (2 * 4 * 4, 1176) and grids == ((1, 4, 4),) * 2


def test_sample_is_uniform_in_time(tmp_path):
    constant = Video(write(tmp_path / "cfr.mp4"))
    for num in (1, 2, 3, 7, 8, 16, 39):
        for start, end in ((0, 39), (5, 30), (38, 39), (4, 4)):
            expected = np.unique(np.linspace(start, end, min(num, 99)).round().astype(int)).tolist()
            assert list(constant.sample(num, start, end)) == expected, (num, start, end)
    assert constant.sample(50) == tuple(range(40)) and constant.sample(4, 10, 12) == (10, 11, 12)
    times = [n * 10 for n in range(30)] + [
        300 + n * 1000 for n in range(10)
    ]  # 0.3 s of 100 fps, then 1 fps
    variable = Video(write(tmp_path / "vfr.mp4", times=times))
    assert variable.times_s == pytest.approx(np.array(times) / 1000)
    assert variable.sample(4) == (0, 33, 36, 39)  # 0, 3.1, 6.2, 9.3 s
    for bad in ((0, 0, 3), (2, -1, 3), (2, 4, 3), (2, 0, 40)):
        with pytest.raises(VideoError, match="sample"):
            constant.sample(*bad)


def test_indices_are_checked(tmp_path):
    video = Video(write(tmp_path / "a.mp4", num=5))
    assert video.frames([]).shape == (0, 3, 48, 64)
    for bad in (-1, 5):
        with pytest.raises(VideoError, match=f"frame {bad} is out of range; it has frames 0 to 4"):
            video.frames([0, bad])
    with pytest.raises(ValueError, match="backend"):
        Video(video.path, backend="opencv")


def test_folder_of_frames(tmp_path):
    pngs = tmp_path / "frames"
    pngs.mkdir()
    for n in (1, 2, 10):
        with av.open(
            str(pngs / f"frame_{n}.png"), "w", format="image2", options={"update": "1"}
        ) as out:
            stream = out.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = 33, 47, "rgb24"
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image(33, 47, n), format="rgb24")))
            out.mux(stream.encode(None))
    (pngs / "notes.txt").write_text("not a frame")
    video = Video(pngs, fps=10)
    assert (video.backend, video.num_frames, video.fps) == (
        "folder",
        3,
        10,
    ) and video.times_s.tolist() == [0, 0.1, 0.2]
    for i, n in enumerate((1, 2, 10)):
        assert torch.equal(
            video.frames([i])[0], torch.from_numpy(image(33, 47, n)).permute(2, 0, 1)
        )
    still = Video(pngs / "frame_2.png")
    assert still.num_frames == 1 and torch.equal(still.frames([0]), video.frames([1]))
    (pngs / "frame_10.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(VideoError, match="frame_10.png: not a readable image"):
        video.frames([2])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(VideoError, match="empty: a folder without"):
        Video(empty)


def test_paths_that_are_no_video(tmp_path):
    with pytest.raises(VideoError, match="no such file"):
        Video(tmp_path / "missing.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="not a regular file"):
        Video(tmp_path / "pipe.mp4")
    secret = write(tmp_path / "secret.mp4", num=2)
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root reads everything
        with pytest.raises(VideoError, match="permissions"):
            Video(secret)


def test_deadline(tmp_path):
    path = write(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="not decoded within 0 s"):
        Video(path, timeout_s=0)
    video = Video(path)
    video.timeout_s = 0
    with pytest.raises(VideoError, match="not decoded within 0 s"):
        video.frames([39])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_open_files_are_left_and_it_pickles(tmp_path):
    path = write(tmp_path / "a.mp4")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    videos = [Video(path, backend="pyav") for _ in range(20)]
    frames = [video.frames([20]) for video in videos]
    assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(pickle.loads(pickle.dumps(videos[0])).frames([20]), frames[0])


# Preprocessing.


def test_preprocess_equals_the_published_processor_bit_for_bit():
    from tests.helpers.make_golden_preprocess import image as formula

    for case in json.loads(
        Path(__file__).with_name("helpers").joinpath("golden_preprocess.json").read_text()
    )["cases"]:
        cfg = ImageConfig(min_pixels=case["bounds"][0], max_pixels=case["bounds"][1])
        patches, grids = preprocess(formula(*case["size"])[None], cfg)
        assert grids == (tuple(case["grid"]),)
        assert {i: patches.flatten()[int(i)].item() for i in case["values"]} == case["values"]
        assert hashlib.sha256(patches.numpy().tobytes()).hexdigest() == case["sha256"], case["size"]


def test_patch_order_by_plain_loops():
    cfg = ImageConfig(patch_size=2, min_pixels=1)
    frames = torch.randint(
        0, 256, (2, 3, 8, 12), dtype=torch.uint8
    )  # already a multiple of 4: no resize
    patches, grids = preprocess(frames, cfg)
    assert grids == ((1, 4, 6),) * 2
    rows = []
    for frame in frames:
        for block_y in range(2):
            for block_x in range(3):
                for y in range(2):
                    for x in range(2):
                        top, left = (block_y * 2 + y) * 2, (block_x * 2 + x) * 2
                        patch = []
                        for c in range(3):
                            pixels = (
                                frame[c, top : top + 2, left : left + 2].flatten().double() / 255
                            )
                            patch += 2 * ((pixels - cfg.image_mean[c]) / cfg.image_std[c]).tolist()
                        rows.append(patch)
    assert torch.allclose(patches.double(), torch.tensor(rows, dtype=torch.double), atol=1e-6)


def test_smart_resize():
    golden = json.loads(
        Path(__file__).with_name("helpers").joinpath("golden_preprocess.json").read_text()
    )["smart_resize"]
    cfg = ImageConfig(max_pixels=50176)
    for size, published in golden:
        assert smart_resize(*size, cfg) == tuple(published), size
    with pytest.raises(VideoError, match="ratio must be at most 200"):
        smart_resize(3, 601, cfg)


def test_image_config(tmp_path):
    raw = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    file = tmp_path / "preprocessor_config.json"
    with pytest.raises(ValueError, match="cannot be read"):
        ImageConfig.from_folder(tmp_path)
    file.write_text(json.dumps(raw | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}))
    assert ImageConfig.from_folder(tmp_path) == ImageConfig(
        16, 2, 2, 65536, 16777216, (0.5,) * 3, (0.5,) * 3
    )
    for broken in (
        "{",
        "[]",
        json.dumps(raw),
        json.dumps(raw | {"min_pixels": 9, "max_pixels": 1}),
    ):
        file.write_text(broken)
        with pytest.raises(ValueError, match="preprocessor_config.json: "):
            ImageConfig.from_folder(tmp_path)


@needs_shared
def test_image_config_of_the_published_models():
    assert ImageConfig.from_folder(SHARED / "qwen" / "Qwen2.5-VL-7B-Instruct") == ImageConfig()
    assert ImageConfig.from_folder(SHARED / "qwen" / "Qwen3-VL-8B-Instruct").max_pixels == 16777216


# Frames that are not the ones asked for.

B_FRAMES, NO_B_FRAMES = {"bf": "2", "g": "12"}, {"bf": "0", "g": "12"}
OPEN_GOPS = B_FRAMES | {"x264-params": "open-gop=1"}
VARIABLE = np.cumsum(np.random.default_rng(0).integers(5, 30, 75)).tolist()
NUMBERED = {
    **{f"plain.{suffix}": NO_B_FRAMES for suffix in ("mp4", "mkv", "mov", "avi", "ts", "flv")},
    **{f"b.{suffix}": B_FRAMES for suffix in ("mp4", "mkv", "mov", "avi", "ts", "m2ts", "flv")},
    **{f"open.{suffix}": OPEN_GOPS for suffix in ("mp4", "mkv", "avi", "ts")},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "12"},
    "mpeg2.mpg": {"codec": "mpeg2video", **B_FRAMES},
    "mpeg2.vob": {"codec": "mpeg2video", **B_FRAMES},
    "mpeg4.avi": {"codec": "mpeg4", **B_FRAMES},
    "variable.mp4": {"times": VARIABLE, "tick": 10, **B_FRAMES},
    "variable.mkv": {"times": VARIABLE, "tick": 10, **B_FRAMES},
    "variable.ts": {"times": VARIABLE, "tick": 10, **B_FRAMES},
    "late.mp4": {"first": 50, "sound": True, **B_FRAMES},
    "late.mkv": {"first": 50, "sound": True, **B_FRAMES},
    "late.ts": {"first": 50, "sound": True, **B_FRAMES},
}


@pytest.mark.parametrize("name", NUMBERED)
@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_the_frame_that_is_asked_for_comes(name, backend, tmp_path):
    """Whatever the container and the codec: alone, all together, and after a seek."""
    if backend == "torchcodec" and media.torchcodec() is None:
        pytest.skip("torchcodec does not load here")
    path = numbered(tmp_path / name, **NUMBERED[name])
    video = Video(path, backend=backend)
    assert video.num_frames == 75
    assert [number_in(frame) for frame in video.frames(range(75))] == [*range(75)]
    for index in (0, 1, 11, 12, 13, 40, 73, 74, 24, 2):
        assert number_in(video.frames([index])[0]) == index

    # and is on screen when a player shows it
    with av.open(str(path)) as container:
        start_s = (container.start_time or 0) / 1e6
        at_s = [frame.time for frame in container.decode(video=0)]
    if None not in at_s and at_s == sorted(at_s) and "avi" not in name:
        shown_s = video.times_s + video.start_s
        assert shown_s == pytest.approx(np.array(at_s) - start_s, abs=0.002)
    assert video.is_steady == ("variable" not in name)


def test_a_decoder_that_gives_other_frames_is_left(tmp_path, monkeypatch):
    """A stand-in for a torchcodec whose frames come late: PyAV's are taken."""

    class Late:
        def __init__(self, *_, **__):
            pass

        def get_frames_at(self, indices):
            data = torch.zeros(len(indices), 3, 64, 160, dtype=torch.uint8)
            return SimpleNamespace(data=data, pts_seconds=torch.tensor(indices) / 25 + 0.4)

    path = numbered(tmp_path / "a.mp4", **B_FRAMES)
    monkeypatch.setattr(media, "torchcodec", lambda: Late)
    video = Video(path)
    assert video.backend == "torchcodec"
    assert number_in(video.frames([5])[0]) == 5 and video.backend == "pyav"


def test_a_span_is_what_a_player_shows_between_its_times(tmp_path):
    late = numbered(tmp_path / "late.mkv", first=50, sound=True, **B_FRAMES)  # pictures from 2 s on
    assert Video(late).start_s == pytest.approx(2.0, abs=0.03)
    part = Video(late, span_s=(3.0, 4.0))
    assert number_in(part.frames([0])[0]) in (24, 25) and 25 <= part.num_frames <= 26
    assert number_in(Video(late, span_s=(0.0, 2.5)).frames([0])[0]) == 0
    for outside in ((0.0, 1.5), (5.2, 9.0)):
        with pytest.raises(VideoError, match="no frame between .* it shows frames from 2.0"):
            Video(late, span_s=outside)

    clip = numbered(tmp_path / "clip.mp4", **B_FRAMES)
    whole = Video(clip)
    for start_s, end_s, first, last in (
        (1.0, 2.0, 25, 50),
        (1.03, 2.03, 25, 50),  # the frame on screen at the start
        (1.041, 1.045, 26, 26),  # shorter than a frame
        (2.9, 30.0, 72, 74),  # as much as there is
        (2.99, 3.5, 74, 74),
    ):
        part = whole.part((start_s, end_s))
        shown = [number_in(frame) for frame in part.frames(range(part.num_frames))]
        assert shown == [*range(first, last + 1)], (start_s, end_s)
        assert part.part((part.start_s, end_s)).num_frames == part.num_frames
    assert whole.num_frames == 75 and whole.end_s == pytest.approx(3.0)


def with_matrix(path: Path, out: Path, *matrix: int) -> Path:
    """The MP4 with another display matrix (a, b, c, d) in its track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    out.write_bytes(data)
    return out


SHOWN_AS = {  # display matrix, EXIF's number: how numpy does it
    (1, 0, 0, 1, 1): lambda x: x,
    (-1, 0, 0, 1, 2): lambda x: x[:, ::-1],
    (-1, 0, 0, -1, 3): lambda x: x[::-1, ::-1],
    (1, 0, 0, -1, 4): lambda x: x[::-1],
    (0, 1, 1, 0, 5): lambda x: x.transpose(1, 0, 2),
    (0, 1, -1, 0, 6): lambda x: np.rot90(x, -1),
    (0, -1, -1, 0, 7): lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    (0, -1, 1, 0, 8): lambda x: np.rot90(x),
    (0, 0, 0, 0, 0): lambda x: x,
}


@pytest.mark.parametrize("key", SHOWN_AS, ids=str)
def test_mirrored_and_turned_pictures_are_shown_as_players_do(key, tmp_path):
    *matrix, exif = key
    plain = write(tmp_path / "a.mp4", num=3)
    as_stored = Video(plain).frames([1])[0].permute(1, 2, 0).numpy()
    turned = with_matrix(plain, tmp_path / "b.mp4", *matrix)
    for backend in ("pyav", None):
        shown = Video(turned, backend=backend).frames([1])[0].permute(1, 2, 0).numpy()
        assert (shown == SHOWN_AS[key](as_stored)).all()

    still = tmp_path / "c.jpg"
    still.write_bytes(encode_jpeg(Video(plain).frames([1])[0]))
    as_stored = Video(still).frames([0])[0].permute(1, 2, 0).numpy()
    tag = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, exif, 0, 0)
    segment = b"Exif\0\0" + tag
    jpeg = still.read_bytes()
    header = b"\xff\xe1" + struct.pack(">H", len(segment) + 2)
    still.write_bytes(jpeg[:2] + header + segment + jpeg[2:])
    shown = Video(still).frames([0])[0].permute(1, 2, 0).numpy()
    assert (shown == SHOWN_AS[key](as_stored)).all()


def test_a_folder_holds_more_than_frames(tmp_path):
    """A folder under a picture's name is none, every kind of picture counts, and the order of equal
    numbers is not the file system's."""
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "x.png").mkdir()
    for k, name in enumerate(("1.png", "2.bmp", "01.png", "3.png")):
        bars = np.full((32, 32, 3), 40 * k, np.uint8)
        data = encode_png(bars)
        if name.endswith("bmp"):
            data = image_module._encode(bars, "image2pipe", "bmp", "bgr24", {})
        (tmp_path / name).write_bytes(data)
    video = Video(tmp_path)
    assert [int(frame[0, 0, 0]) for frame in video.frames(range(4))] == [80, 0, 40, 120]


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile b.mp4\n", "\ufeff#EXTM3U\nb.ts\n", "<?xml?><MPD>b</MPD>"]
)
def test_a_playlist_in_disguise_opens_nothing(text, tmp_path):
    numbered(tmp_path / "b.mp4", num=10)
    (tmp_path / "c.mp4").write_text(text)
    with pytest.raises(VideoError, match="c.mp4: a playlist, which names other files"):
        Video(tmp_path / "c.mp4")
