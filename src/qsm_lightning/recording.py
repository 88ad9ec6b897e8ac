"""Pictures of an episode: frames, a strip of them, a video file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import step_mdp

from qsm_lightning.durable import check_writable
from qsm_lightning.envs import make_render_env
from qsm_lightning.errors import SettingError, require
from qsm_lightning.evaluation import MAX_EPISODE_FRAMES

GL_HINT = "install a GL library and set MUJOCO_GL=egl (or osmesa, or glfw with a display)"
SUFFIXES = (".mp4", ".gif")


def record_episode(
    name: str,
    policy: TensorDictModuleBase,
    env_seed: int,
    noise_seed: int,
    max_frames: int = 1_000,
    every: int = 1,
    each_step: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, float]:
    """Run one episode, rendering every ``every``-th frame; torch's global generators are left as they were.

    Args:
        name: the environment's.
        policy: acts in it.
        env_seed: of the episode's start.
        noise_seed: of the policy's noise.
        max_frames: frames of the episode that are rendered at most; it goes on to its end.
        every: frames from one that is rendered to the next.
        each_step: called after every step; may raise to leave the episode.

    Returns:
        Frames [N, height, width, 3] of uint8, and the episode's return.

    Raises:
        SettingError: when the environment cannot be rendered here.
    """
    env, render = make_render_env(name)
    frames, episode_return = [], 0.0
    with torch.random.fork_rng(), closing(env):
        torch.manual_seed(noise_seed)
        env.set_seed(env_seed)
        state = env.reset()
        for i in range(MAX_EPISODE_FRAMES):
            stepped = env.step(policy(state))
            each_step()
            episode_return += stepped["next", "reward"].item()
            if i < max_frames and i % every == 0:
                frames.append(render_frame(name, render))
            if stepped["next", "done"].item():
                break
            state = step_mdp(stepped)
    return np.stack(frames), episode_return


def render_frame(name: str, render: Callable[[], np.ndarray]) -> np.ndarray:
    """One frame [height, width, 3], or a :class:`SettingError` that says how to make rendering work."""
    try:
        frame = render()
    except NotImplementedError:
        frame = None
    except Exception as error:  # GL libraries raise whatever they like
        raise SettingError(f"{name} cannot be rendered here ({type(error).__name__}: {error}); {GL_HINT}") from error
    if frame is None:
        raise SettingError(f"{name} cannot be rendered: it has no rgb_array mode")
    return np.asarray(frame)


def check_renderable(name: str) -> None:
    """Render one frame, or raise a :class:`SettingError` that says how to make rendering work."""
    env, render = make_render_env(name)
    env.reset()
    render_frame(name, render)
    env.close()


def picture_strip(frames: np.ndarray, count: int = 8, height: int = 160) -> np.ndarray:
    """``count`` frames at equal distances side by side, [height', width', 3]; each at most ``height`` high."""
    step = max(1, frames.shape[1] // height)
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int), ::step, ::step]
    return np.concatenate(list(chosen), axis=1)


def check_video_path(path: str) -> None:
    """Raise :class:`SettingError` unless ``path`` can become a video here."""
    check_writable(Path(path), "--video")
    require(Path(path).suffix in SUFFIXES, f"--video is {path!r}: the name must end in .mp4 or .gif")
    if Path(path).suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError as error:
            raise SettingError(
                "--video with .mp4 needs imageio-ffmpeg: pip install 'qsm-lightning[video]', or write a .gif"
            ) from error


def write_video(path: str, frames: np.ndarray, fps: int = 30) -> None:
    """Write frames [N, height, width, 3] of uint8 to an .mp4 or .gif file."""
    import imageio.v3 as iio

    check_video_path(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".gif"):
        iio.imwrite(path, frames, duration=1000 / fps, loop=0)
    else:
        height, width = (size - size % 2 for size in frames.shape[1:3])  # the codec wants even sizes
        iio.imwrite(path, frames[:, :height, :width], fps=fps, macro_block_size=1)
