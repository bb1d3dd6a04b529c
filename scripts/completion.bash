# Completes the flags of this project's scripts after `python SCRIPT --`. In bash: source scripts/completion.bash
# The first time, a script's --help is asked for them, which takes seconds. zsh: autoload -U bashcompinit; bashcompinit
declare -gA _lit_llama_flags
_lit_llama() {
    local word="${COMP_WORDS[COMP_CWORD]}" script="${COMP_WORDS[1]}"
    [[ $word == -* ]] && grep -qs 'from lit_llama.runtime.cli import run' "$script" || return
    [[ ${_lit_llama_flags[$script]} ]] ||
        _lit_llama_flags[$script]=$("${COMP_WORDS[0]}" "$script" --help 2>/dev/null | grep -oE '^  --[a-z0-9_.]+')
    COMPREPLY=($(compgen -W "${_lit_llama_flags[$script]}" -- "$word"))
}
complete -o default -F _lit_llama python python3
