"""Options of sd-scripts that this version doesn't have: which are refused, and which only mean something beside those.

Nothing is accepted and ignored: a refused option ends the run before it starts, an unused one is told in a line.
"""

_UNSUPPORTED = (
    (
        "fp16_master_weights_and_gradients",
        "weights that are trained in parts are float32, and so are their gradients; leave it out",
    ),
    ("dataset_class", "a class of sd-scripts can't be loaded here; describe the pictures by --dataset_config"),
)

UNSUPPORTED = {name: reason for names, reason in _UNSUPPORTED for name in names.split()}

NO_EFFECT = {
    "offload_optimizer_nvme_path": "nothing is moved to NVMe drives here",
    "offload_param_nvme_path": "nothing is moved to NVMe drives here",
}
