"""Keys that real config files carry though the script they are given to has no such option: what each one is.

One file often serves several scripts, and GUIs write their own keys beside the options; such a key gets a warning,
where an unknown key close to an option is a mistake. What the script at hand does know is never looked up here.
"""

_SDXL_TRAIN = "block_lr diffusers_xformers fused_optimizer_groups learning_rate_te1 learning_rate_te2 train_text_encoder use_safetensors"
_NETWORK = (
    "network_module network_dim network_alpha network_dropout network_args network_weights network_train_unet_only"
    " network_train_text_encoder_only unet_lr text_encoder_lr dim_from_weights base_weights base_weights_multiplier"
    " scale_weight_norms training_comment prior_loss_weight fp8_base_unet no_metadata initial_epoch initial_step"
    " skip_until_initial_step validation_seed validation_split validate_every_n_steps validate_every_n_epochs"
    " max_validation_steps"
)
_TEXTUAL_INVERSION = "token_string init_word num_vectors_per_token weights use_object_template use_style_template"
_LLLITE = "cond_emb_dim conditioning_data_dir"
_GENERATION = "ckpt outdir prompt from_file images_per_prompt sampler steps scale strength textual_inversion_embeddings"

# Written by GUIs for their own use, or for scripts that are no SDXL scripts.
_GUI = (
    "epoch max_resolution noise_offset_type sdxl sdxl_cache_text_encoder_outputs sdxl_no_half_vae"
    " flux1_checkbox sd3_checkbox LoRA_type additional_parameters num_machines num_processes num_cpu_threads_per_process"
    " dynamo_use_dynamic dynamo_use_fullgraph dynamo_mode extra_accelerate_launch_args main_process_port multi_gpu gpu_ids"
    " t5xxl clip_l ae guidance_scale discrete_flow_shift model_prediction_type sigmoid_scale"
    " weighting_scheme blocks_to_swap apply_t5_attn_mask t5xxl_max_token_length"
    " controlnet_model_name_or_path model_type"
)

FOREIGN_KEYS: dict[str, str] = {
    **dict.fromkeys(_GUI.split(), "written by a GUI or for another model"),
    **dict.fromkeys(_GENERATION.split(), "an option of sdxl_gen_img.py"),
    **dict.fromkeys(_LLLITE.split(), "an option of sdxl_train_control_net_lllite.py"),
    **dict.fromkeys(_TEXTUAL_INVERSION.split(), "an option of sdxl_train_textual_inversion.py"),
    **dict.fromkeys(_SDXL_TRAIN.split(), "an option of sdxl_train.py"),
    **dict.fromkeys(_NETWORK.split(), "an option of sdxl_train_network.py"),
}
