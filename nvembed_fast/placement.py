"""Where a model runs and how it computes: decided once, checked once, before any weight is read."""

from dataclasses import dataclass

import torch

from nvembed_fast import ops
from nvembed_fast.config import LatentForm, Latents, NVEmbedConfig, check_dtype_name, check_latents

__all__ = ["DTYPES", "Placement", "check_device", "check_dtype", "dtype_name", "latent_form", "place"]

# by their names in safetensors files
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


# the operation that a model with this form of the latents does not call
_OTHER_FORM = {"absorbed": "latent_attention", "direct": "absorbed_latent_attention"}


@dataclass(frozen=True)
class Placement:
    """Where a model runs and how it computes.

    Attributes:
        device: of the weights and the computation.
        dtype: of the weights and the computation. Pooling and the vectors are fp32.
        impl: see `nvembed_fast.ops`. "auto" stays "auto": it decides for each operation.
        latents: the form that the latent head takes. None for a model with another head.
        cuda_graphs: a short text that comes alone replays a CUDA graph.
    """

    device: torch.device
    dtype: torch.dtype
    impl: ops.Impl
    latents: LatentForm | None
    cuda_graphs: bool

    @classmethod
    def decide(
        cls,
        config: NVEmbedConfig,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        impl: ops.Impl = "auto",
        latents: Latents = "auto",
        cuda_graphs: bool = False,
    ) -> "Placement":
        """The placement of a model with this config. "auto" has the kernels of a GPU proven for inference.

        Args:
            config: the parsed config.json.
            device: None takes the GPU if there is one, else the CPU. A number is that of a GPU.
            dtype: None takes float32 on a CPU and the dtype of the stored weights elsewhere.
            impl: "auto", "triton", "library" or "torch".
            latents: "absorbed", "direct", or "auto" for the cheaper one of the two.
            cuda_graphs: needs Triton kernels on a GPU.

        Raises:
            ValueError: an argument is wrong, or cannot be had here.
        """
        ops.check_impl(impl)
        form = latent_form(latents, config)
        device, dtype = place(config, device, dtype)
        placement = cls(device, dtype, impl, form, cuda_graphs)
        implementation, reason = placement.implementation()
        if cuda_graphs and (device.type != "cuda" or implementation != "triton"):
            obstacle = reason if implementation != "triton" else "tensors are on the CPU"
            raise ValueError(f"cuda_graphs=True needs Triton kernels on a GPU: {obstacle}")
        if impl == "auto":
            unproven = ops.prove(placement.device, placement.dtype)
            unproven.pop(_OTHER_FORM.get(form or "", ""), None)
            if cuda_graphs and unproven:
                name, reason = next(iter(unproven.items()))
                raise ValueError(
                    f"cuda_graphs=True needs proven kernels: of {name} {reason}. `nvembed-fast check` shows "
                    "more, and impl='triton' takes the kernels all the same"
                )
        return placement

    def implementation(self) -> tuple[ops.Implementation, str]:
        """The implementation that the operations take here, and the reason.

        Raises:
            ValueError: `impl` is "triton" and Triton cannot run here.
        """
        with ops.use_impl(self.impl):
            return ops.choose(self.device, self.dtype)


def place(
    config: NVEmbedConfig,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[torch.device, torch.dtype]:
    """Where weights go, and in which dtype: see `Placement.decide`. Proves nothing."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = check_device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else config.torch_dtype
    return device, check_dtype(dtype)


def latent_form(latents: str, config: NVEmbedConfig) -> LatentForm | None:
    """The form of the latent head that is taken. None for a model with another head."""
    form = check_latents(latents)
    if config.pooling_head == "latent":
        return config.latent_attention_config.cheaper_form if form == "auto" else form
    if latents != "auto":
        raise ValueError(
            f"latents={latents!r} is about the latent head, but this model pools by {config.pooling_head!r}"
        )
    return None


def check_device(device: str | int | torch.device) -> torch.device:
    """The device, or a ValueError when it is not there. A number is that of a GPU."""
    if isinstance(device, int):
        device = f"cuda:{device}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not a device: use 'cpu', 'cuda' or 'cuda:0'") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        have = f"only {count} CUDA device(s), from cuda:0" if count else "no CUDA device"
        raise ValueError(
            f"device {str(device)!r} is not there: torch {torch.__version__} finds {have}. "
            "Use device='cpu', or a torch built for CUDA on a machine with a GPU"
        )
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).split(". ")[0]  # torch lists all its backends behind it
        raise ValueError(f"device {str(device)!r} is not there ({reason}): use 'cpu' or 'cuda'") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no weights: use 'cpu' or 'cuda'")
    return found


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that weights can have, from itself or its name, or a ValueError."""
    return getattr(torch, check_dtype_name(dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
