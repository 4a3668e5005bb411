import time
from running import *
from test_resume import *
def test_t(golden_model, pictures, tmp_path):
    train_network(golden_model, pictures, tmp_path/"w", "--max_train_steps","1")
    for n,w in {"base":[], "noise":["--noise_offset", "0.1", "--noise_offset_random_strength","--adaptive_noise_scale", "0.1", "--multires_noise_iterations", "2", "--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"],"drop":["--network_dropout", "0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.1"], "plus":["--network_args","loraplus_lr_ratio=4"],"scale":["--scale_weight_norms","1"],"ema":["--ema_decay","0.9"],"flip":["--flip_aug"],"state":["--save_every_n_steps","1","--save_state"]}.items():
        t=time.time(); train_network(golden_model, pictures, tmp_path/n, *EPOCHS_OF_4, *w); print("T", n, round(time.time()-t,1))
