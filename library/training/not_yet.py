"""Options of sd-scripts that this version doesn't have: which are refused, and which only mean something beside those.

Nothing is accepted and ignored: a refused option ends the run before it starts, an unused one is told in a line.
"""

_LATER = "can't be used yet in this version"

_REFUSED = (
    (
        "deepspeed offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path zero3_init_flag"
        " zero3_save_16bit_model fp16_master_weights_and_gradients",
        f"DeepSpeed {_LATER}; on several cards FSDP2 cuts the model as ZeRO-3 does (docs/multi_gpu.md)",
    ),
    ("dataset_class", "a class of sd-scripts can't be loaded here; describe the pictures by --dataset_config"),
)

REFUSED = {name: reason for names, reason in _REFUSED for name in names.split()}

UNUSED = {
    "zero_stage": "there is no --deepspeed yet",
}
