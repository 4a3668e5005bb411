"""Options of sd-scripts that this version doesn't have: which are refused, and which only mean something beside those.

Nothing is accepted and ignored: a refused option ends the run before it starts, an unused one is told in a line.
"""

_LATER = "can't be used yet in this version"

_REFUSED = (
    (
        "save_state save_state_on_train_end save_last_n_epochs_state save_last_n_steps_state resume initial_epoch initial_step skip_until_initial_step",
        f"saving and resuming states {_LATER}; --save_every_n_steps with --network_weights goes on from saved weights",
    ),
    (
        "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility"
        " save_state_to_huggingface resume_from_huggingface async_upload",
        f"uploading {_LATER}; upload the saved files with the hub's own command, hf upload",
    ),
    (
        "sample_every_n_steps sample_every_n_epochs sample_at_first",
        f"samples during training {_LATER}; leave it out, and draw with tools/before_after.py",
    ),
    (
        "wandb_api_key log_tracker_config log_config",
        f"wandb and tracker settings {_LATER}; use --logging_dir for TensorBoard",
    ),
    (
        "deepspeed offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path zero3_init_flag"
        " zero3_save_16bit_model fp16_master_weights_and_gradients",
        f"DeepSpeed {_LATER}; leave it out",
    ),
    (
        "full_fp16 full_bf16 fp8_base fp8_base_unet",
        f"it {_LATER}; take --mixed_precision bf16, which keeps what is trained in float32",
    ),
    ("torch_compile", f"it {_LATER}; leave it out"),
    ("fused_backward_pass", f"it {_LATER}; a network's gradients are small, so leave it out"),
    ("cpu_offload_checkpointing", f"it {_LATER}; take --gradient_checkpointing alone"),
    ("dataset_class", "a class of sd-scripts can't be loaded here; describe the pictures by --dataset_config"),
    ("base_weights base_weights_multiplier", f"it {_LATER}; leave it out"),
)

REFUSED = {name: reason for names, reason in _REFUSED for name in names.split()}

UNUSED = {
    "sample_sampler": "there are no samples during training yet",
    "sample_prompts": "there are no samples during training yet",
    "wandb_run_name": "there is no --log_with wandb yet",
    "zero_stage": "there is no --deepspeed yet",
    "dynamo_backend": "there is no --torch_compile yet",
}
