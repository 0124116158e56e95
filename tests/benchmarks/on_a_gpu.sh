#!/usr/bin/env bash
# What has to be measured on a GPU, one part after the other, on a machine that is paid by the minute.
#
#   bash tests/benchmarks/on_a_gpu.sh 28 speed scoring ablations     # within 28 minutes
#
# Parts, in the order in which they are given; what times something goes first, a study takes what is left:
#   all, search, main, ablations   of experiment.py, several runs at a time (SLOTS, default 7, which fit an H100; GPUS, default 0;
#              STUDIES, of the ablations), by NVIDIA's MPS where it is
#   equality   one adapter, of the ablations or ADAPTER, read by both backends     -> equality.json
#   memory     training for which a cap on memory is too small at first            -> memory.log in WORK
#   speed      DPO's trainers side by side on Llama 3 8B's shape within 24 GB      -> speed.json
#   scoring    1,208 users, both orders and responses, one arm of that shape       -> evaluation_speed.json
#   small      the trainers side by side on the small model                        -> speed.json
#   two        two GPUs against one, and a model that two share                    -> two_gpus.json
#   liger      Liger's kernels in the hf backend, against transformers' (pip install liger-kernel)  -> gpu.json
#   graphs     the shared trainer with CUDA graphs and without, the same steps: the small model, with its profile, and Llama 3 8B's
#              shape, not held to 24 GB                                            -> gpu.json, profile_small.json
#   compiled   the small model in the hf backend with each layer through torch.compile  -> gpu.json
#   eight      Llama 3 8B's shape within 24 GB, micro-batch and effective batch 8  -> gpu.json
#   whole_unsloth, whole_hf  both scripts from end to end: SFT, DPO from it and from the base on the small model, scored  -> in WORK
#   launched   after whole_unsloth: its DPO from SFT once more without CUDA graphs, scored beside it  -> in WORK
#   first      after whole_unsloth: the first loss of DPO by TRL's own trainer, by both backends from both starting points  -> in WORK
#   profile    where a micro-batch of the shared trainer on that shape goes        -> profile.json
# WORK (default outputs/study) and RESULTS (default docs/results) are folders; each part's log lies in WORK.
set -u
cd "$(dirname "$0")/../.." || exit
minutes=$1 && shift
began=$(date +%s)
work=${WORK:-outputs/study} results=${RESULTS:-docs/results} pairs=${PAIRS:-data/contrastive_rec_train.jsonl}
bench=tests/benchmarks shape=${SHAPE:-$HOME/llama-3-8b-shape}
export PYTHONUNBUFFERED=1 TQDM_DISABLE=1
mkdir -p "$work" "$results"

left() { echo $((60 * minutes - ($(date +%s) - began))); }

say() { echo "$(date +%T), $(left) s left: $*" | tee -a "$work/parts.log"; }

study() { # experiment.py PART: no training starts in the last four minutes, so that what is trained is scored
    [ -e "$work/search.json" ] || cp docs/results/search.json "$work/" 2>/dev/null
    for kind in random popularity; do
        [ -e "data/pairs_ml-100k_$kind.jsonl" ] || python3 data/build_pairs.py --source ml-100k --negatives $kind --output "data/pairs_ml-100k_$kind.jsonl"
    done
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps
    nvidia-cuda-mps-control -d
    timeout "$(left)" python3 $bench/experiment.py "$1" --work "$work" --pairs "$pairs" --slots "${SLOTS:-7}" \
        --gpus ${GPUS:-0} ${STUDIES:+--studies $STUDIES} \
        --small_pairs data/pairs_ml-100k_random.jsonl data/pairs_ml-100k_popularity.jsonl --minutes $((($(left) - 240) / 60))
    say "$1: exit code $?"
    echo quit | nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

make_8b() { # Llama 3 8B's shape with random weights, made once
    [ -e "$shape" ] || python3 -c "
import sys; sys.path[:0] = ['$bench', '.']
import pathlib, config, gpu
gpu.build_shape(pathlib.Path('$shape'), str(config.small_model_folder()))"
}

of_8b() { # a benchmark on that shape
    make_8b
    timeout "$(left)" python3 "$@" --preset thesis --model "$shape" --shape "Llama-3-8B, random weights" --pairs "$pairs" --results "$results"
}

small_model=SmolLM2-135M-Instruct-Q4_1

one_small() { # gpu.py on the small model, one backend, not held to 24 GB
    timeout "$(left)" python3 $bench/gpu.py --model $small_model --shape SmolLM2-135M --memory_gb 0 --effective_batch 64 \
        --cases "[[\"$1\", \"shared\", 64, false]]" --warm_up 12 --timed 12 "${@:2}" --pairs "$pairs" --results "$results"
}

of_8b_gpu() { # gpu.py on that shape
    make_8b
    timeout "$(left)" python3 $bench/gpu.py --model "$shape" "$@" --pairs "$pairs" --results "$results"
}

of_backend() { # flags of both scripts for a backend, with the study's settings
    common=(--preset thesis --base_model $small_model --pairs "$pairs" --outputs "$work/whole_$1")
    training=(--backend "$1" --effective_batch 64 --batch_size 64 --sft_epochs 4 --epochs 4 --sft_learning_rate 1e-3 --learning_rate 2e-4)
    scoring=(--strangers false --generate_users 0 --fast true)
    sft="$work/whole_$1/smollm2_sft_4bit_final" dpo="$work/whole_$1/smollm2_dpo_4bit_final"
}

whole() { # one backend: SFT and DPO from it, DPO from the base, and the scores of all three
    of_backend "$1"
    timeout "$(left)" python3 train_dpo.py "${common[@]}" "${training[@]}"
    timeout "$(left)" python3 train_dpo.py "${common[@]}" "${training[@]}" --stage dpo --init base --outputs "$work/whole_$1/base"
    timeout "$(left)" python3 evaluate_dpo.py "${common[@]}" "${scoring[@]}" --adapters "sft=$sft" "dpo=$dpo" "dpo_base=$work/whole_$1/base/smollm2_dpo_4bit_final"
}

launched() { # DPO through Unsloth from that SFT once more, without CUDA graphs, and the scores of both
    of_backend unsloth
    timeout "$(left)" python3 train_dpo.py "${common[@]}" "${training[@]}" --stage dpo --sft_adapter "$sft" --cuda_graphs false --outputs "$work/launched"
    arms=("sft=$sft" "dpo=$dpo" "launched=$work/launched/smollm2_dpo_4bit_final")
    timeout "$(left)" python3 evaluate_dpo.py "${common[@]}" "${scoring[@]}" --adapters "${arms[@]}" --outputs "$work/launched"
}

first() { # the first loss of DPO by TRL's own trainer: both backends, from the base and from Unsloth's SFT
    of_backend unsloth
    for backend in unsloth hf; do
        for init in base sft; do
            timeout "$(left)" python3 train_dpo.py "${common[@]}" "${training[@]}" --stage dpo --init $init --sft_adapter "$sft" --backend $backend \
                --trainer stock --batch_size 32 --max_pairs 64 --validation_pairs 0 --max_steps 1 --outputs "$work/first_${backend}_$init"
        done
    done
}

for part in "$@"; do
    [ "$(left)" -gt 60 ] || { say "no time for $part"; continue; }
    case $part in
        all | search | main | ablations) study "$part" ;;
        speed) of_8b $bench/training.py --memory_gb 24 --effective_batch 16 --turns 1 --timed 4 \
            --cases '[["shared", 16, false], ["unsloth", 8, true], ["stock", 8, true]]' ;;
        scoring) of_8b $bench/evaluation.py --modes tf32 ;;
        small) timeout "$(left)" python3 $bench/training.py --preset thesis --model $small_model --no_checkpointing --warm_up 2 --timed 12 \
            --effective_batch 64 --cases '[["shared", 64], ["unsloth", 64], ["stock", 64]]' --pairs "$pairs" --results "$results" ;;
        equality) timeout "$(left)" python3 $bench/equality.py --adapter ${ADAPTER:-"$work"/ablations/dpo_same/*_final} --preset small --pairs "$pairs" \
            --users 16 --results "$results" ;;
        memory) timeout "$(left)" python3 train_dpo.py --preset thesis --base_model $small_model --stage dpo --init base \
            --pairs "$pairs" --outputs "$work/memory" --max_pairs 640 --max_steps 4 --effective_batch 64 --batch_size 64 \
            --gradient_checkpointing false --gpu_memory_gb 3 ;;
        two) of_8b $bench/two_gpus.py ;;
        profile) of_8b_gpu --cases '[["unsloth", "shared", 16, false]]' --profile "$results/profile.json" --effective_batch 16 ;;
        eight) of_8b_gpu --cases '[["unsloth", "shared", 8, false], ["unsloth", "shared", 8, true], ["unsloth", "stock", 8, true]]' ;;
        liger) for kernels in "" "--kernels liger"; do
            of_8b_gpu --cases '[["hf", "shared", 8, true], ["hf", "shared", 16, true]]' $kernels --effective_batch 16
        done ;;
        graphs) for graphs in true false; do
            one_small unsloth --cuda_graphs $graphs $([ $graphs = true ] && echo --profile "$results/profile_small.json")
            of_8b_gpu --cases '[["unsloth", "shared", 16, false]]' --memory_gb 0 --effective_batch 16 --warm_up 32 --cuda_graphs $graphs
        done ;;
        compiled) one_small hf --kernels compiled ;;
        whole_unsloth | whole_hf) whole "${part#whole_}" ;;
        launched | first) "$part" ;;
        *) say "there is no part $part" && exit 2 ;;
    esac > "$work/$part.log" 2>&1
    say "$part: exit code $?"
done
