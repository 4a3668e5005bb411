from test_resume import *


def test_t(begun, golden_model, tmp_path):
    print("T base", rows_of(begun.output, 2)[0]["loss/current"])
    for n, w in {
        "vae": ["--vae_batch_size", "2"],
        "disk": ["--cache_latents_to_disk"],
        "work": ["--max_data_loader_n_workers", "1", "--cache_latents_to_disk"],
        "rest": ["--save_precision", "fp16"],
    }.items():
        train_network(
            golden_model, begun.pictures, tmp_path / n, *THREE, *w, "--resume", begun.at(2), "--resume_anyway"
        )
        print("T", n, rows_of(tmp_path / n)[0]["loss/current"])
