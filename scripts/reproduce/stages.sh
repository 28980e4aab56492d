# Sourced by scripts of several stages. A stage that is done is passed over, one that was cut goes on, one that fails ends
# the script with its name and log. Ctrl-C, SIGTERM and SIGUSR1 reach the training, which saves; the same call goes on.
#
# Before a stage: OUT, the folder of the results (logs are in $OUT/logs), and launch, the words before train.py and eval.py.

job='' launched='' stopped=''
trap 'on_signal INT 2' INT
trap 'on_signal TERM 15' TERM
trap 'on_signal USR1 10' USR1
trap 'on_signal HUP 1' HUP

on_signal() {
    stopped=${stopped:-$1 $2}
    case $job in '') end_as_signalled ;; starting) ;; *) forward_signal ;; esac
}

# The stage gets USR1, upon which train.py saves: Ctrl-C may have reached it already, and a second one would kill it. The
# launcher passes no signal on, and would die of it: its children are the training.
forward_signal() {
    if [ -z "$launched" ] || ! pkill -USR1 -P "$job"; then kill -USR1 "$job" 2>/dev/null || true; fi
}

end_as_signalled() {
    echo "stopped by SIG${stopped% *}: the same call goes on" >&2
    exit $((128 + ${stopped#* }))
}

# stage NAME PRODUCT PROGRAM ARGS...: run PROGRAM (train.py and eval.py by the launcher), unless it has made the file PRODUCT
# by this very command from these very inputs. An empty PRODUCT: always. The words of `more` are added, and not compared.
more=()
stage() {
    local name=$1 product=$2 log="$OUT/logs/$1.log" code now what words size writer line start=$SECONDS
    shift 2
    [ -z "$stopped" ] || end_as_signalled
    now=$(describe "$(dirname "$product")" "$@")
    if [ -n "$product" ] && [ -f "$product" ] && [ -f "$OUT/logs/$name.done" ]; then
        if [ "$now" = "$(cat "$OUT/logs/$name.done")" ]; then echo "== $name is there"; return; fi
        what=$(dirname "$product")
        case $what in */final) what=$(dirname "$what") ;; esac # a run: with its checkpoints
        echo "$name: error: $what is the result of another command or of other inputs, see $OUT/logs/$name.done:" \
            "set another OUT, give that command again, or delete both to do it anew" >&2
        exit 2
    fi
    mkdir -p "$(dirname "$log")"
    echo "== $name"
    launched=''
    case $1 in train.py | eval.py) launched=1 words=("${launch[@]}") ;; *) words=(python) ;; esac
    size=$(stat -c %s "$log" 2>/dev/null || echo 0)
    exec 3> >(trap '' INT TERM USR1 HUP; exec tee -pa "$log") # -p: goes on when its reader has gone
    writer=$! job=starting
    "${words[@]}" "$@" ${more[@]+"${more[@]}"} </dev/null >&3 2>&3 3>&- &
    job=$!
    [ -z "$stopped" ] || forward_signal # it came while the stage was starting
    exec 3>&-
    while true; do # a signal ends `wait` early
        code=0
        wait "$job" || code=$?
        kill -0 "$job" 2>/dev/null || break
    done
    job=''
    for _ in $(seq 100); do kill -0 "$writer" 2>/dev/null || break; sleep 0.05; done # tee has written all
    [ -z "$stopped" ] || end_as_signalled
    if [ "$code" != 0 ]; then
        # A launcher hides the program's own line and exit code behind a traceback of its own; a progress bar of another
        # process may stand before it on the line.
        line=$(tail -c +$((size + 1)) "$log" | tr '\r' '\n' | grep -oE '[a-z_]+\.py: error: .*' | tail -n 1) || true
        [ -z "$line" ] || { echo "$line" >&2; code=2; }
        echo "stage $name failed (exit code $code); its log: $log" >&2
        exit "$code"
    fi
    if [ -n "$product" ]; then echo "$now" >"$OUT/logs/$name.done"; fi
    echo "== $name took $((SECONDS - start)) s"
}

describe() { # describe OWN COMMAND: it, the YAML files that it names, when the models (but for its own) that it names were made
    local own=$1 word mark
    shift
    printf '%q ' "$@"
    echo
    for word; do
        case $word in "$own") continue ;; *.yaml) cksum "$word" ;; esac
        for mark in COMPLETED drop.json; do [ ! -f "$word/$mark" ] || date -r "$word/$mark" "+$word %F %T"; done
    done
}

train_run() { # train_run RUN ARGS...: train in the folder RUN, or go on there
    local run=$1
    shift
    resume_words "$run"
    stage "${run#"$OUT"/}/train" "$run/final/COMPLETED" train.py "$@" --output_dir "$run"
    more=()
}

resume_words() { # resume_words RUN: into `more` the word that train.py needs for a folder in which a run was cut
    more=()
    if [ -f "$1/run.json" ]; then more=(--resume); fi
}

score() { # score NAME MODEL DIR ARGS...: completions of this very model are kept
    local name=$1 model=$2 dir=$3
    shift 3
    more=(--overwrite) # those of another one are not
    stage "$name" "$dir/scores.json" eval.py --model "$model" --output_dir "$dir" "$@"
    more=()
}
