#include "cli/app.h"

#include <array>
#include <charconv>
#include <functional>
#include <memory>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <fmt/format.h>

#include "base/rate_limits.h"
#include "control/attachment.h"
#include "control/suggest.h"
#include "nova/limits.h"
#include "vm/state_file.h"

namespace stellarium::cli {
namespace {

constexpr const char* kFooter = R"(Examples, a first session:
  stellarctl init
  stellarctl image import debian debian.qcow2
  stellarctl volume clone debian vm-{n} --count 1000
  stellariumd &
  stellarctl attach vm-1 --vhost-user ./vm-1.sock
  stellarctl snapshot create vm-1 before-upgrade
  stellarctl stats

The store is --store, else $STELLARIUM_STORE, else /var/lib/stellarium for root and
~/.local/share/stellarium for others. A daemon that holds it is found by itself; --socket or
$STELLARIUM_SOCKET names one. Sizes are written 512, 64KiB, 10GiB. A SOURCE is an image, a volume or
VOLUME@SNAPSHOT.

Exit codes: 0 done, 1 unexpected, 2 wrong words or values, 3 not found, 4 exists already, 5 busy,
6 corrupt, 7 unsupported, 8 I/O error, 9 no space, 10 read-only, 11 permission denied, 12 limit
exceeded, 13 unavailable (no daemon, a missing tool), 14 would block, 15 broken off by the system
before anything happened, 16 interrupted (Ctrl-C) or cancelled, 17 protocol error, 18 gone
meanwhile. See stellarctl(1).)";

struct NumberRange {
    uint64_t least = 0;
    uint64_t most = 0;
};
constexpr uint64_t kMaxLockTimeoutSeconds = 86'400;
constexpr uint64_t kMaxMachinesPerCall = 1000;

/// An empty word is a variable that was not set; the default in its place would be a surprise.
CLI::Validator not_empty(const std::string& what) {
    return {[what](std::string& value) {
                return value.empty() ? "it is empty, and must name " + what : std::string();
            },
            ""};
}

/// Builds the commands, each with what all of them share.
class Builder {
  public:
    Builder(CLI::App& app, Invocation& invocation) : app_(app), invocation_(invocation) {}

    CLI::App* group(const std::string& name, const std::string& help, const std::string& examples) {
        CLI::App* const noun = app_.add_subcommand(name, help);
        noun->footer("Examples:\n" + examples);
        noun->require_subcommand(1);
        return noun;
    }

    CLI::App* command(CLI::App* parent, const std::string& name, const std::string& help,
                      Command function, const std::string& examples) {
        CLI::App* const verb = parent->add_subcommand(name, help);
        verb->footer("Examples:\n" + examples);
        Invocation& invocation = invocation_;
        const std::string path = parent == &app_ ? name : parent->get_name() + " " + name;
        verb->callback([&invocation, function, path] {
            invocation.command = function;
            invocation.command_path = path;
        });
        common(verb);
        return verb;
    }

    /// Options that every command takes, before or after its words.
    void common(CLI::App* app) {
        const auto in_group = [](CLI::Option* option) { option->group("Common options"); };
        in_group(app->add_option("--store", invocation_.location.store, "the store")
                     ->type_name("DIR")
                     ->check(not_empty("a folder")));
        in_group(app->add_option("--socket", invocation_.location.socket,
                                 "the control socket of the daemon to use")
                     ->type_name("PATH")
                     ->check(not_empty("a socket")));
        std::chrono::milliseconds& lock_timeout = invocation_.location.lock_timeout;
        in_group(number(
            app, "--lock-timeout", {0, kMaxLockTimeoutSeconds}, "SECONDS",
            fmt::format("how long to wait for another command that has the store, or "
                        "a daemon that is starting (default: {})",
                        kDefaultLockTimeout.count()),
            [&lock_timeout](uint64_t seconds) { lock_timeout = std::chrono::seconds(seconds); }));
        in_group(app->add_flag("--json", invocation_.json, "print JSON"));
        in_group(app->add_flag("--bytes", invocation_.exact_bytes, "print sizes in bytes"));
        in_group(app->add_flag("--no-progress", invocation_.no_progress,
                               "show no progress line, even on a terminal"));
        in_group(app->add_flag("--allow-unsafe-file-system",
                               invocation_.location.allow_unsafe_file_system,
                               "use a store on a network file system all the same"));
    }

    /// An option with a whole number as its value, in the range.
    static CLI::Option* number(CLI::App* app, const std::string& name, NumberRange range,
                               const std::string& type, const std::string& help,
                               const std::function<void(uint64_t)>& take) {
        return app
            ->add_option_function<std::string>(
                name,
                [name, range, take](const std::string& text) {
                    uint64_t value = 0;
                    const char* const end = text.data() + text.size();
                    const auto [stop, code] = std::from_chars(text.data(), end, value);
                    if (code != std::errc() || stop != end || value < range.least ||
                        value > range.most) {
                        throw CLI::ValidationError(
                            name, fmt::format("'{}' is not a whole number from {} to {}", text,
                                              range.least, range.most));
                    }
                    take(value);
                },
                help)
            ->type_name(type);
    }

    CLI::Option* word(CLI::App* app, const std::string& name, std::string& into,
                      const std::string& help, const std::string& type) {
        return app->add_option(name, into, help)->required()->type_name(type);
    }

    void allow_stale(CLI::App* app) {
        app->add_flag("--allow-stale", invocation_.location.allow_stale,
                      "of a damaged store, take what the volume held before what is missing");
    }
    /// What lists share: which, and how much of each.
    void listing(CLI::App* app, const std::string& type) {
        app->add_option("NAME", invocation_.arguments.names,
                        "only these: names, or patterns with *")
            ->type_name(type);
        names_only(app);
    }
    void names_only(CLI::App* app) {
        app->add_flag("-q,--quiet", invocation_.arguments.quiet, "print only the names");
    }

    Arguments& arguments() { return invocation_.arguments; }

  private:
    CLI::App& app_;
    Invocation& invocation_;
};

void add_image_commands(CLI::App& app, Builder& builder) {
    Arguments& arguments = builder.arguments();
    (void)app;
    CLI::App* const image = builder.group("image", "Images: read-only disks to clone from",
                                          "  stellarctl image import debian debian.qcow2\n"
                                          "  stellarctl image ls\n"
                                          "  stellarctl help image import");
    CLI::App* verb = builder.command(
        image, "import", "Import a disk image: raw, qcow2, vmdk, vhdx, vdi, vpc, found by content",
        image_import,
        "  stellarctl image import debian debian.qcow2\n"
        "  stellarctl image import empty-disk /dev/vdb\n"
        "  curl -s https://example.org/disk.raw.xz | xz -dc | stellarctl image import disk -\n"
        "  zstd -dc disk.raw.zst | stellarctl image import disk -");
    builder.word(verb, "NAME", arguments.name, "name of the new image", "");
    builder.word(verb, "PATH", arguments.path, "the file; '-' reads raw bytes from standard input",
                 "FILE");
    verb->add_option("--format", arguments.format,
                     "take the file for this format, whatever its content looks like: raw, qcow2, "
                     "vmdk, vhdx, vdi or vpc")
        ->type_name("FORMAT");
    verb->add_flag("--allow-backing", arguments.allow_backing,
                   "follow references to other files (backing file, data file) in the image");
    verb->add_flag("--allow-empty", arguments.allow_empty,
                   "make an image of 0 bytes of a pipe that gives nothing");

    verb = builder.command(image, "ls", "List the images", image_list,
                           "  stellarctl image ls\n"
                           "  stellarctl image ls 'debian-*' --json");
    builder.listing(verb, "IMAGE");
    verb = builder.command(image, "info", "Show an image", image_info,
                           "  stellarctl image info debian");
    builder.word(verb, "NAME", arguments.name, "the image", "IMAGE");
    verb = builder.command(image, "rm", "Remove images; clones of them stay", image_remove,
                           "  stellarctl image rm debian-11 debian-10");
    verb->add_option("NAME", arguments.names, "the images")->required()->type_name("IMAGE");
    verb = builder.command(image, "rename", "Rename an image", image_rename,
                           "  stellarctl image rename debian debian-12");
    builder.word(verb, "OLD", arguments.name, "the image", "IMAGE");
    builder.word(verb, "NEW", arguments.other_name, "its new name", "");
    verb = builder.command(image, "set", "Say what may be done with an image", image_set,
                           "  stellarctl image set debian --shareable yes");
    builder.word(verb, "NAME", arguments.name, "the image", "IMAGE");
    verb->add_option("--shareable", arguments.shareable,
                     "whether programs that use the store through its daemon may map the image "
                     "into their memory; who does can read whatever else is in the same segments")
        ->required()
        ->check(CLI::IsMember({"yes", "no"}))
        ->type_name("yes|no");
    verb = builder.command(image, "export", "Write an image to a raw file, sparse", image_export,
                           "  stellarctl image export debian debian.raw\n"
                           "  stellarctl image export debian - | zstd > debian.raw.zst");
    builder.word(verb, "NAME", arguments.name, "the image", "IMAGE");
    builder.word(verb, "PATH", arguments.path, "a file, a block device, or '-' for standard output",
                 "FILE");
    verb->add_flag("--force", arguments.force, "replace a file, overwrite a device");
}

void add_volume_commands(Builder& builder) {
    Arguments& arguments = builder.arguments();
    CLI::App* const volume = builder.group("volume", "Volumes: writable disks",
                                           "  stellarctl volume create data --size 10GiB\n"
                                           "  stellarctl volume clone debian vm-1\n"
                                           "  stellarctl help volume clone");
    CLI::App* verb = builder.command(volume, "create", "Make an empty volume", volume_create,
                                     "  stellarctl volume create data --size 10GiB");
    builder.word(verb, "NAME", arguments.name, "name of the new volume", "");
    verb->add_option("--size", arguments.size, "its size, a multiple of 512 bytes")
        ->required()
        ->type_name("SIZE");

    verb =
        builder.command(volume, "clone", "Make volumes that start equal to a source", volume_clone,
                        "  stellarctl volume clone debian vm-1\n"
                        "  stellarctl volume clone vm-1@before-upgrade vm-1-old\n"
                        "  stellarctl volume clone debian vm-{n} --count 1000   # vm-1 to vm-1000");
    builder.word(verb, "SOURCE", arguments.source, "image, volume or VOLUME@SNAPSHOT", "SOURCE");
    builder.word(verb, "NAME", arguments.name, "name of the clone; {n} becomes its number", "");
    Builder::number(verb, "--count", {1, nova::kMaxClonesPerCall}, "N",
                    fmt::format("make this many, 1 to {}, all or none", nova::kMaxClonesPerCall),
                    [&arguments](uint64_t count) { arguments.count = count; });

    verb = builder.command(volume, "ls", "List the volumes", volume_list,
                           "  stellarctl volume ls\n"
                           "  stellarctl volume ls --json | jq -r '.[].name'\n"
                           "  stellarctl volume rm $(stellarctl volume ls -q 'ci-*')");
    builder.listing(verb, "VOLUME");
    verb = builder.command(volume, "info", "Show a volume, or a snapshot of it", volume_info,
                           "  stellarctl volume info vm-1\n"
                           "  stellarctl volume info vm-1@before-upgrade");
    builder.word(verb, "NAME", arguments.name, "volume or VOLUME@SNAPSHOT", "VOLUME");
    verb = builder.command(volume, "resize", "Grow a volume, or shrink it while it is not attached",
                           volume_resize,
                           "  stellarctl volume resize vm-1 20GiB\n"
                           "  stellarctl volume resize vm-1 +5GiB\n"
                           "  stellarctl volume resize vm-1 10GiB --shrink   # discards the end");
    builder.word(verb, "NAME", arguments.name, "the volume", "VOLUME");
    builder.word(verb, "SIZE", arguments.size, "its new size, or +SIZE to add to it", "");
    verb->add_flag("--shrink", arguments.shrink,
                   "make it smaller, and discard what lies beyond the new size");
    verb = builder.command(volume, "rename", "Rename a volume", volume_rename,
                           "  stellarctl volume rename vm-1 web-1");
    builder.word(verb, "OLD", arguments.name, "the volume", "VOLUME");
    builder.word(verb, "NEW", arguments.other_name, "its new name", "");
    verb = builder.command(volume, "rm", "Remove volumes with their snapshots, all or none",
                           volume_remove, "  stellarctl volume rm vm-1 vm-2");
    verb->add_option("NAME", arguments.names, "the volumes")->required()->type_name("VOLUME");
    verb = builder.command(volume, "export", "Write a volume or snapshot to a raw file, sparse",
                           volume_export,
                           "  stellarctl volume export vm-1 vm-1.raw\n"
                           "  stellarctl volume export vm-1@before /dev/vdb --force");
    builder.word(verb, "NAME", arguments.name, "volume or VOLUME@SNAPSHOT", "SOURCE");
    builder.word(verb, "PATH", arguments.path, "a file, a block device, or '-' for standard output",
                 "FILE");
    verb->add_flag("--force", arguments.force, "replace a file, overwrite a device");
    builder.allow_stale(verb);
    verb = builder.command(volume, "diff", "List the ranges that differ between two sources",
                           volume_diff,
                           "  stellarctl volume diff vm-1@before vm-1\n"
                           "  stellarctl volume diff debian vm-1 --json");
    builder.word(verb, "A", arguments.source, "image, volume or VOLUME@SNAPSHOT", "SOURCE");
    builder.word(verb, "B", arguments.other_name, "image, volume or VOLUME@SNAPSHOT", "SOURCE");
}

void add_snapshot_commands(Builder& builder) {
    Arguments& arguments = builder.arguments();
    CLI::App* const snapshot = builder.group("snapshot", "Snapshots: kept states of volumes",
                                             "  stellarctl snapshot create vm-1 before-upgrade\n"
                                             "  stellarctl snapshot rollback vm-1 before-upgrade\n"
                                             "  stellarctl help snapshot rollback");
    const auto name_words = [&](CLI::App* verb, const std::string& type) {
        builder.word(verb, "VOLUME", arguments.name, "the volume, or VOLUME@NAME", "VOLUME");
        verb->add_option("NAME", arguments.other_name, "the snapshot's name")->type_name(type);
    };
    CLI::App* verb =
        builder.command(snapshot, "create", "Keep the present state of a volume", snapshot_create,
                        "  stellarctl snapshot create vm-1 before-upgrade\n"
                        "  stellarctl snapshot create vm-1@before-upgrade   # the same");
    name_words(verb, "");
    verb =
        builder.command(snapshot, "ls", "List the snapshots of one or all volumes", snapshot_list,
                        "  stellarctl snapshot ls\n  stellarctl snapshot ls vm-1 --json");
    verb->add_option("VOLUME", arguments.name, "the volume; all when left out")
        ->type_name("VOLUME");
    builder.names_only(verb);
    verb = builder.command(snapshot, "info", "Show a snapshot", snapshot_info,
                           "  stellarctl snapshot info vm-1 before-upgrade");
    name_words(verb, "SNAPSHOT");
    verb = builder.command(snapshot, "rollback",
                           "Make a volume, not attached, equal to one of its snapshots",
                           snapshot_rollback, "  stellarctl snapshot rollback vm-1 before-upgrade");
    name_words(verb, "SNAPSHOT");
    verb = builder.command(snapshot, "rm", "Remove a snapshot", snapshot_remove,
                           "  stellarctl snapshot rm vm-1 before-upgrade\n"
                           "  stellarctl snapshot rm vm-1@before-upgrade");
    name_words(verb, "SNAPSHOT");
}

/// --iops and --bandwidth with their bursts.
void add_limits(CLI::App* verb, Arguments& arguments) {
    Builder::number(verb, "--iops", {kMinIops, kMaxIops}, "N",
                    "requests a second that the guest may make at most, of every kind",
                    [&arguments](uint64_t iops) { arguments.iops = iops; });
    verb->add_option("--bandwidth", arguments.bandwidth,
                     "bytes a second that the guest may read and write at most, such as 100MiB")
        ->type_name("SIZE")
        ->check(not_empty("a size"));
    Builder::number(verb, "--iops-burst", {1, kMaxIops * kMaxBurstSeconds}, "N",
                    "requests that it may make at once after a rest (default: one second's worth)",
                    [&arguments](uint64_t burst) { arguments.iops_burst = burst; });
    verb->add_option("--bandwidth-burst", arguments.bandwidth_burst,
                     "bytes that it may read and write at once after a rest (default: the same)")
        ->type_name("SIZE")
        ->check(not_empty("a size"));
}

void add_attachment_commands(CLI::App& app, Builder& builder) {
    Arguments& arguments = builder.arguments();
    CLI::App* verb = builder.command(
        &app, "attach", "Give a volume to a virtual machine, through the daemon", attach,
        "  stellarctl attach vm-1 --vhost-user /run/user/1000/vm-1.sock\n"
        "  stellarctl attach debian --vhost-user ./debian.sock --read-only --queues 4\n"
        "  stellarctl attach vm-2 --vhost-user ./vm-2.sock --iops 2000 --bandwidth 100MiB");
    builder.word(verb, "VOLUME", arguments.name,
                 "the volume; read-only also an image or VOLUME@SNAPSHOT", "SOURCE");
    verb->add_option("--vhost-user", arguments.path,
                     "where the virtual machine monitor finds the vhost-user-blk socket")
        ->required()
        ->type_name("SOCKET");
    verb->add_flag("--read-only", arguments.read_only, "the guest cannot write");
    Builder::number(
        verb, "--queues", {1, control::kMaxQueues}, "N",
        fmt::format("queues that the guest may use, 1 to {} (default: 1)", control::kMaxQueues),
        [&arguments](uint64_t queues) { arguments.queues = queues; });
    verb->add_option("--serial", arguments.serial,
                     "serial number that the guest sees, at most 20 bytes (default: the name)")
        ->type_name("S");
    verb->add_option("--block-size", arguments.block_size,
                     "logical block that the guest sees, 512 or 4096")
        ->type_name("BYTES");
    add_limits(verb, arguments);
    verb = builder.command(&app, "limit", "Change how much the guest of a volume may do", limit,
                           "  stellarctl limit vm-1 --iops 500 --iops-burst 5000\n"
                           "  stellarctl limit vm-1 --bandwidth 20MiB   # and requests no more\n"
                           "  stellarctl limit vm-1 --none");
    builder.word(verb, "VOLUME", arguments.name, "the volume", "ATTACHMENT");
    add_limits(verb, arguments);
    verb->add_flag("--none", arguments.no_limits, "take the limits away")
        ->excludes("--iops", "--bandwidth", "--iops-burst", "--bandwidth-burst");
    verb =
        builder.command(&app, "detach", "Take a volume back", detach, "  stellarctl detach vm-1");
    builder.word(verb, "VOLUME", arguments.name, "the volume", "ATTACHMENT");
    builder.command(&app, "attachments", "List what is attached", list_attachments,
                    "  stellarctl attachments\n  stellarctl attachments --json");
    verb = builder.command(
        &app, "mount", "Show images, volumes and snapshots as files below a directory", mount_files,
        "  stellarctl mount /srv/disks\n"
        "  ls -l /srv/disks/volumes");
    builder.word(verb, "DIR", arguments.path, "an empty directory", "DIR");
    builder.command(&app, "unmount", "Take the directory of files away", unmount_files,
                    "  stellarctl unmount");
}

void add_boot_commands(CLI::App& app, Builder& builder) {
    Arguments& arguments = builder.arguments();
    CLI::App* const boot =
        builder.group("boot", "Boots: what they read, recorded once and staged ever after",
                      "  stellarctl boot record vm-1      # then boot the guest\n"
                      "  stellarctl boot stop vm-1\n"
                      "  stellarctl boot show debian");
    CLI::App* verb = builder.command(
        boot, "record", "Record what the guest of an attached volume reads", boot_record,
        "  stellarctl attach vm-1 --vhost-user ./vm-1.sock\n"
        "  stellarctl boot record vm-1      # then boot the guest");
    builder.word(verb, "VOLUME", arguments.name, "the volume", "ATTACHMENT");
    verb = builder.command(boot, "stop",
                           "End a recording, and merge it into the boot manifest of the image",
                           boot_stop,
                           "  stellarctl boot stop vm-1\n"
                           "  stellarctl boot stop vm-1 --discard");
    builder.word(verb, "VOLUME", arguments.name, "the volume", "ATTACHMENT");
    verb->add_flag("--discard", arguments.discard, "store nothing");
    builder.command(boot, "ls", "List the boot manifests, and the recordings that run", boot_list,
                    "  stellarctl boot ls\n  stellarctl boot ls --json");
    verb = builder.command(boot, "show", "Show the boot manifest that a source has or inherits",
                           boot_show,
                           "  stellarctl boot show debian\n"
                           "  stellarctl boot show vm-1 --json | jq '.runs[]'");
    builder.word(verb, "SOURCE", arguments.name, "image, volume or VOLUME@SNAPSHOT", "SOURCE");
    verb = builder.command(
        boot, "set", "Say what a boot of an image needs besides its disk", boot_set,
        "  stellarctl boot set debian --kernel debian-vmlinuz --initrd debian-initrd\n"
        "  stellarctl boot set debian --hints 'root=/dev/vda1 console=ttyS0'\n"
        "  stellarctl boot set debian --initrd ''     # none");
    builder.word(verb, "SOURCE", arguments.name, "the image, or what descends from it", "SOURCE");
    verb->add_option("--kernel", arguments.kernel, "an image that holds the kernel; '' for none")
        ->type_name("IMAGE");
    verb->add_option("--initrd", arguments.initrd, "an image that holds the initrd; '' for none")
        ->type_name("IMAGE");
    verb->add_option("--hints", arguments.hints,
                     "text for whoever starts the machine, such as a kernel command line")
        ->type_name("TEXT");
    verb = builder.command(
        boot, "extract", "Take kernel and initrd out of an image's own /boot, as images",
        boot_extract,
        "  stellarctl boot extract debian   # makes debian.vmlinuz and debian.initrd");
    builder.word(verb, "IMAGE", arguments.name, "the image", "IMAGE");
    verb = builder.command(boot, "rm",
                           "Remove the boot manifest of the image that a source descends from",
                           boot_remove, "  stellarctl boot rm debian");
    builder.word(verb, "SOURCE", arguments.name, "image, volume or VOLUME@SNAPSHOT", "SOURCE");
    verb = builder.command(&app, "prefetch", "Bring into memory what a boot of a volume will read",
                           prefetch,
                           "  stellarctl prefetch vm-1         # before its machine is started\n"
                           "  stellarctl prefetch debian --all # everything that it holds");
    builder.word(verb, "SOURCE", arguments.name, "image, volume or VOLUME@SNAPSHOT", "SOURCE");
    verb->add_flag("--all", arguments.all, "everything, and not what the boot manifest lists");
}

void add_vm_run(CLI::App* vm, Builder& builder) {
    Arguments& arguments = builder.arguments();
    CLI::App* const verb = builder.command(
        vm, "run", "Start a machine, on a new clone or on the disk that it has", vm_run,
        "  stellarctl vm run web --image debian\n"
        "  stellarctl vm run web --image debian --memory 1GiB --cpus 2 \\\n"
        "      --kernel ./vmlinuz --initrd ./initrd --append 'root=/dev/vda rw console=ttyS0'\n"
        "  stellarctl vm run web            # again, after a stop");
    builder.word(verb, "NAME", arguments.name, "name of the machine", "MACHINE");
    verb->add_option("--image", arguments.image, "what its disk is a clone of")
        ->type_name("SOURCE")
        ->check(not_empty("an image"));
    verb->add_option("--memory", arguments.memory, "its RAM, whole MiB (default: 256MiB)")
        ->type_name("SIZE");
    Builder::number(verb, "--cpus", {1, vm::kMaxCpus}, "N", "its processors (default: 1)",
                    [&arguments](uint64_t cpus) { arguments.cpus = cpus; });
    verb->add_option("--kernel", arguments.kernel,
                     "a kernel to boot; else that of the image's boot manifest, or the disk's "
                     "own boot loader")
        ->type_name("FILE");
    verb->add_option("--initrd", arguments.initrd, "an initial RAM disk for it")->type_name("FILE");
    verb->add_option("--append", arguments.append, "its command line")->type_name("TEXT");
    verb->add_option("--nic", arguments.nics,
                     "a network card, as of QEMU's -nic; may be repeated (default: none)")
        ->type_name("TEXT");
    verb->add_option("--accel", arguments.accelerator,
                     "kvm, tcg or auto: kvm where it works (default: auto)")
        ->type_name("ACCEL")
        ->check(CLI::IsMember({"kvm", "tcg", "auto"}));
}

void add_vm_commands(Builder& builder) {
    Arguments& arguments = builder.arguments();
    CLI::App* const vm =
        builder.group("vm", "Machines: QEMU on the store's files, with memory snapshots",
                      "  stellarctl vm run web --image debian\n"
                      "  stellarctl vm snapshot web warm\n"
                      "  stellarctl vm restore web@warm web-{n} --count 20");
    add_vm_run(vm, builder);
    CLI::App* verb = builder.command(
        vm, "snapshot", "Keep disk, RAM and devices of a running machine, of one moment",
        vm_snapshot, "  stellarctl vm snapshot web warm");
    builder.word(verb, "NAME", arguments.name, "the machine", "MACHINE");
    builder.word(verb, "SNAPSHOT", arguments.other_name, "the snapshot's name", "");
    verb = builder.command(vm, "restore", "Start machines that go on from a snapshot", vm_restore,
                           "  stellarctl vm restore web@warm web-1 web-2\n"
                           "  stellarctl vm restore web@warm web-{n} --count 20");
    builder.word(verb, "SNAPSHOT", arguments.source, "MACHINE@SNAPSHOT", "MACHINE@SNAPSHOT");
    verb->add_option("NEW", arguments.names, "names of the new machines; {n} becomes a number")
        ->required();
    Builder::number(verb, "--count", {1, kMaxMachinesPerCall}, "N",
                    fmt::format("start this many, 1 to {}, all or none", kMaxMachinesPerCall),
                    [&arguments](uint64_t count) { arguments.count = count; });
    builder.command(vm, "ls", "List machines and their snapshots", vm_list,
                    "  stellarctl vm ls\n  stellarctl vm ls --json | jq -r '.machines[].name'");
    verb = builder.command(vm, "logs", "Print what a machine's console has said", vm_logs,
                           "  stellarctl vm logs web | tail");
    builder.word(verb, "NAME", arguments.name, "the machine", "MACHINE");
    verb = builder.command(vm, "stop", "Have a machine power off", vm_stop,
                           "  stellarctl vm stop web\n"
                           "  stellarctl vm stop web --force     # as if the power went");
    builder.word(verb, "NAME", arguments.name, "the machine", "MACHINE");
    verb->add_flag("--force", arguments.force, "at once, without asking the guest");
    Builder::number(
        verb, "--timeout", {0, kMaxLockTimeoutSeconds}, "SECONDS",
        fmt::format("how long to wait for the guest (default: {})", arguments.timeout_s),
        [&arguments](uint64_t seconds) { arguments.timeout_s = seconds; });
    verb = builder.command(
        vm, "rm", "Remove machines with their disks and snapshots, or a snapshot", vm_remove,
        "  stellarctl vm rm web-1 web-2 --force\n"
        "  stellarctl vm rm web@warm          # clones of it go on");
    verb->add_option("NAME", arguments.names, "machines, or MACHINE@SNAPSHOT")
        ->required()
        ->type_name("MACHINE");
    verb->add_flag("--force", arguments.force, "also machines that run");
}

void add_store_commands(CLI::App& app, Builder& builder, Invocation& invocation) {
    CLI::App* const collect = builder.command(
        &app, "gc", "Free what nothing refers to any more, while everything goes on",
        collect_garbage,
        "  stellarctl gc\n"
        "  stellarctl gc --dry-run          # only says what could be freed\n"
        "  stellarctl gc --rate 100MiB      # leaves the disk to the guests");
    collect->add_flag("--dry-run", builder.arguments().dry_run, "free nothing");
    collect
        ->add_option("--rate", builder.arguments().rate,
                     "copy and free at most this many bytes a second, at least 1MiB")
        ->type_name("SIZE")
        ->check(not_empty("a size"));
    CLI::App* const scrubbed = builder.command(
        &app, "scrub", "Read and check everything that is stored, while everything goes on", scrub,
        "  stellarctl scrub                 # goes on where the last one was stopped\n"
        "  stellarctl scrub --rate 1GiB\n"
        "  stellarctl scrub --status        # what is damaged, and who uses it; reads nothing");
    CLI::Option* const rate =
        scrubbed
            ->add_option("--rate", builder.arguments().rate,
                         "read at most this many bytes a second, at least 1MiB; 0: no limit "
                         "(default: 256MiB)")
            ->type_name("SIZE")
            ->check(not_empty("a size"));
    CLI::Option* const restart =
        scrubbed->add_flag("--restart", builder.arguments().restart, "from the start");
    scrubbed
        ->add_flag("--status", builder.arguments().only_status,
                   "only say how far it is and what is known to be damaged")
        ->excludes(restart)
        ->excludes(rate);
    CLI::App* const counts = builder.command(
        &app, "stats", "Show what the store holds and saves", stats,
        "  stellarctl stats\n"
        "  stellarctl stats --json | jq .dedup_ratio\n"
        "  stellarctl stats --sharing --files /srv/files   # what is in memory, and who shares it");
    CLI::Option* const sharing = counts->add_flag(
        "--sharing", builder.arguments().sharing,
        "instead, what of each image, volume and snapshot is in memory, and how much of that is "
        "shared with others");
    counts
        ->add_option("--files", builder.arguments().files,
                     "with the pages of the files below the directory that the daemon mounts")
        ->needs(sharing)
        ->type_name("DIR");
    builder.command(&app, "status", "Show the store's state and who serves it", status,
                    "  stellarctl status");
    CLI::App* const check = builder.command(
        &app, "fsck", "Check a store that no daemon holds, and repair it", check_store,
        "  stellarctl fsck                  # looks only; 0: all is well, 6: damage\n"
        "  stellarctl fsck --data           # also reads all content and checks it\n"
        "  stellarctl fsck --repair --store /srv/pool\n"
        "  stellarctl fsck --json | jq '.lost[]'");
    check->add_flag("--repair", builder.arguments().repair,
                    "make the store whole again, and say what is lost");
    check->add_flag("--data", builder.arguments().data,
                    "read all content and check it against its ids");
    CLI::App* const dumped = builder.command(
        &app, "dump", "Print one of the store's files in words, damaged ones too", dump,
        "  stellarctl dump /var/lib/stellarium/superblock\n"
        "  stellarctl dump /var/lib/stellarium/segments/0000001.seg");
    builder.word(dumped, "FILE", builder.arguments().path, "the file", "FILE");
    CLI::App* const completion =
        app.add_subcommand("completion", "Print a completion script for a shell");
    completion->footer(
        "Examples:\n"
        "  source <(stellarctl completion bash)\n"
        "  stellarctl completion zsh > ~/.zfunc/_stellarctl\n"
        "  stellarctl completion fish > ~/.config/fish/completions/stellarctl.fish");
    completion->add_option("SHELL", invocation.shell, "bash, zsh or fish")
        ->required()
        ->type_name("SHELL");
    completion->add_flag("--json", invocation.json, "print JSON");
    completion->callback([&invocation] { invocation.command_path = "completion"; });
    CLI::App* const help = app.add_subcommand("help", "Show the help of a command");
    help->footer("Examples:\n  stellarctl help\n  stellarctl help volume clone");
    help->add_option("COMMAND", builder.arguments().names, "the command's words");
    CLI::App* const version = app.add_subcommand("version", "Print the version");
    version->footer("Examples:\n  stellarctl version");
    version->add_flag("--json", invocation.json, "print JSON");
    version->callback([&invocation] { invocation.command_path = "version"; });
}

/// Does this word, an option, take the next one as its value?
bool takes_value(CLI::App& app, const std::string& word) {
    const CLI::Option* const option = app.get_option_no_throw(word);
    return option != nullptr && option->get_items_expected_max() > 0;
}

}  // namespace

void build_app(CLI::App& app, Invocation& invocation) {
    app.name("stellarctl");
    app.description("stellarctl: images, volumes and snapshots of a Stellarium store.");
    app.footer(kFooter);
    app.set_version_flag("--version", "stellarctl " STELLARIUM_VERSION);
    app.require_subcommand(1);
    Builder builder(app, invocation);
    builder.common(&app);
    builder.command(&app, "init", "Make an empty store", init,
                    "  stellarctl init\n  stellarctl init --store /srv/pool");
    add_image_commands(app, builder);
    add_volume_commands(builder);
    add_snapshot_commands(builder);
    add_attachment_commands(app, builder);
    add_boot_commands(app, builder);
    add_vm_commands(builder);
    add_store_commands(app, builder, invocation);
}

CLI::App* find_command(CLI::App& app, std::string_view name) {
    const std::vector<CLI::App*> found =
        app.get_subcommands([&](CLI::App* command) { return command->get_name() == name; });
    return found.empty() ? nullptr : found.front();
}

std::string unknown_command(CLI::App& app, std::span<const std::string> words) {
    CLI::App* at = &app;
    for (size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        if (word.starts_with('-')) {
            if (word.find('=') == std::string::npos && takes_value(*at, word)) {
                ++i;
            }
            continue;
        }
        const std::vector<CLI::App*> below = at->get_subcommands([](CLI::App*) { return true; });
        if (below.empty()) {
            return {};
        }
        CLI::App* const next = find_command(*at, word);
        if (next == nullptr) {
            std::vector<std::string> names;
            names.reserve(below.size());
            for (const CLI::App* command : below) {
                names.push_back(command->get_name());
            }
            return fmt::format("there is no command '{}{}'{}",
                               at == &app ? "" : at->get_name() + " ", word,
                               control::did_you_mean(word, names));
        }
        at = next;
    }
    return {};
}

}  // namespace stellarium::cli
