# fish completion for stellarctl; made by `stellarctl completion fish`
function __stellarctl_complete
    set -l words (commandline -opc)
    set -e words[1]
    for line in (stellarctl __complete $words (commandline -ct) 2>/dev/null)
        if test "$line" = ":files"
            __fish_complete_path (commandline -ct)
        else
            echo $line
        end
    end
end
complete -c stellarctl -f -a "(__stellarctl_complete)"
