/* Stellarium's C interface: a content-addressed store of disks for programs that run virtual
 * machines.
 *
 *     stellarium_store *store;
 *     if (stellarium_open("/srv/pool", NULL, &store) == STELLARIUM_BUSY)   // a daemon has it
 *         stellarium_connect("/srv/pool", NULL, &store);
 *     stellarium_clone(store, "debian", (const char *[]){"vm-1"}, 1);
 *
 *     stellarium_volume *disk;
 *     stellarium_volume_open(store, "vm-1", NULL, &disk);
 *     stellarium_read(disk, 0, buffer, 4096);
 *
 *     stellarium_mapping *root;                       // shared with all who map the image
 *     stellarium_map(store, "debian", NULL, &root);
 *     use(stellarium_mapping_address(root), stellarium_mapping_size(root));
 *
 * Results: 0 (STELLARIUM_OK), or a negative code below; stellarium_last_error() then says what
 * happened, to what, and what to do. Codes may be added: take one that you do not know for a
 * failure.
 *
 * Structs: those that you fill begin with their size, as your compiler knows it
 * (`stellarium_map_options options = {.size = sizeof options}`), so that a library that is newer or
 * older than your program understands them. Fields that a struct has more than the library knows
 * must be zero. NULL takes the defaults. Structs grow at their end and change in no other way.
 *
 * Threads: any function may be called from any thread at the same time, on the same handle, too,
 * except that nobody else uses a handle while it is closed. Text that a function returns belongs to
 * the library; that of stellarium_last_error() lasts until this thread calls the library again.
 * Handles of one store are closed before the store. After fork(2) a child uses none of them.
 *
 * Durability: what creates, clones, snapshots or removes is durable when it returns. A write is
 * visible at once, and kept over the end of the process when a daemon has the store; it is durable
 * when a stellarium_flush() that began later returns. stellarium_volume_close() flushes.
 *
 * docs/guides/embedding.md tells more, examples/ has programs.
 */
#ifndef STELLARIUM_H
#define STELLARIUM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when functions or fields are added; nothing is ever taken away. */
#define STELLARIUM_ABI_VERSION 1

enum {
    STELLARIUM_OK = 0,
    STELLARIUM_INVALID_ARGUMENT = -1,   /* the request itself is wrong */
    STELLARIUM_NOT_FOUND = -2,          /* the named thing is not there */
    STELLARIUM_ALREADY_EXISTS = -3,     /* the name is taken */
    STELLARIUM_BUSY = -4,               /* something holds it: an attachment, another process */
    STELLARIUM_CORRUPT = -5,            /* stored bytes fail their check */
    STELLARIUM_UNSUPPORTED = -6,        /* a newer format, or a file system that cannot do it */
    STELLARIUM_IO = -7,                 /* the operating system reported a failed operation */
    STELLARIUM_NO_SPACE = -8,           /* no room */
    STELLARIUM_READ_ONLY = -9,          /* the store, volume or image cannot be written */
    STELLARIUM_PERMISSION_DENIED = -10, /* the operating system or a policy said no */
    STELLARIUM_LIMIT_EXCEEDED = -11,    /* a documented bound was reached */
    STELLARIUM_UNAVAILABLE = -12,       /* the daemon is not there, or does not serve this */
    STELLARIUM_WOULD_BLOCK = -13,       /* would have had to wait */
    STELLARIUM_INTERRUPTED = -14,       /* before anything happened */
    STELLARIUM_CANCELLED = -15,         /* given up on request */
    STELLARIUM_PROTOCOL = -16,          /* the other side broke its protocol */
    STELLARIUM_STALE = -17              /* it has moved or gone: look it up again */
};

typedef struct stellarium_store stellarium_store;
typedef struct stellarium_volume stellarium_volume;
typedef struct stellarium_mapping stellarium_mapping;

/* ---- About the library and errors ---------------------------------------------------------- */

/* "0.1.0". */
const char* stellarium_version(void);
/* STELLARIUM_ABI_VERSION of the library that is loaded. */
uint32_t stellarium_abi_version(void);
/* What the last call of this thread that failed had to say; "" when none has. */
const char* stellarium_last_error(void);
/* "not_found"; "unknown" for codes that the library does not have. Never NULL. */
const char* stellarium_error_name(int code);
/* What to do about it, in a few words. Never NULL. */
const char* stellarium_error_advice(int code);

/* ---- Stores -------------------------------------------------------------------------------- */

typedef struct stellarium_store_options {
    size_t size;
    /* stellarium_open: do not change anything. */
    uint32_t read_only;
    /* stellarium_open: collect garbage by itself when much is dead. */
    uint32_t collect_garbage;
    /* stellarium_open: memory for unflushed writes, in bytes; 0: 256 MiB. */
    uint64_t dirty_bytes;
    /* stellarium_connect: the daemon's control socket; NULL: where the store's daemon listens. */
    const char* socket;
} stellarium_store_options;

/* Makes an empty store in a directory that is empty or missing. */
int stellarium_create_store(const char* directory);
/* Opens the store itself. It is held by one process at a time: STELLARIUM_BUSY says by whom, and
 * when that is a daemon, to connect to it. */
int stellarium_open(const char* directory, const stellarium_store_options* options,
                    stellarium_store** store);
/* Connects to the daemon that holds the store; STELLARIUM_UNAVAILABLE: none does. Reading and
 * writing goes through its NBD socket (stellariumd --nbd). */
int stellarium_connect(const char* directory, const stellarium_store_options* options,
                       stellarium_store** store);
/* Flushes what is unflushed and closes the store; all else that belongs to it must be closed.
 * The handle is gone, also on failure. NULL is fine. */
int stellarium_close(stellarium_store* store);
/* 1 when this is a connection to a daemon, 0 when the store is open in this process. */
int stellarium_through_daemon(const stellarium_store* store);

/* ---- Images, volumes, snapshots ------------------------------------------------------------ */

/* A snapshot is written VOLUME@SNAPSHOT. */

enum { STELLARIUM_KIND_IMAGE = 1, STELLARIUM_KIND_VOLUME = 2, STELLARIUM_KIND_SNAPSHOT = 4 };

typedef struct stellarium_info {
    size_t size;
    uint32_t kind;
    uint32_t attached;  /* somebody has it open, or an attachment is on record */
    uint32_t shareable; /* clients of a daemon may map it */
    uint32_t damaged;   /* its content is not known */
    uint64_t id;        /* never used again after removal */
    uint64_t size_bytes;
    char name[264];
    char parent[264]; /* what it was cloned from or is a snapshot of; "" for none */
} stellarium_info;

/* A new, empty volume; a multiple of 512 bytes. */
int stellarium_volume_create(stellarium_store* store, const char* name, uint64_t size_bytes);
/* `count` volumes that begin as equals of `source`: all or none, and at once. */
int stellarium_clone(stellarium_store* store, const char* source, const char* const* names,
                     size_t count);
/* Holds every write that was completed before. */
int stellarium_snapshot(stellarium_store* store, const char* volume, const char* snapshot);
/* An image, a volume with its snapshots, or a snapshot. */
int stellarium_remove(stellarium_store* store, const char* name);
/* Says whether clients of the daemon may map an image. Who maps it can read whatever else is in the
 * same segments of the store. */
int stellarium_set_shareable(stellarium_store* store, const char* image, int shareable);
/* `info->size` is set by you. */
int stellarium_get_info(stellarium_store* store, const char* name, stellarium_info* info);
/* Calls `visit` for each thing of `kinds` (STELLARIUM_KIND_...), sorted by name within a kind,
 * until it returns something else than 0. The info lasts during the call, which may use the store.
 */
int stellarium_list(stellarium_store* store, uint32_t kinds,
                    int (*visit)(void* user, const stellarium_info* info), void* user);

/* ---- Reading and writing ------------------------------------------------------------------- */

typedef struct stellarium_volume_options {
    size_t size;
    /* Images and snapshots are read-only anyway. A volume has one writer at a time. */
    uint32_t read_only;
} stellarium_volume_options;

int stellarium_volume_open(stellarium_store* store, const char* name,
                           const stellarium_volume_options* options, stellarium_volume** volume);
/* Flushes; the handle is gone, also on failure. NULL is fine. */
int stellarium_volume_close(stellarium_volume* volume);
uint64_t stellarium_volume_size(const stellarium_volume* volume);
int stellarium_volume_read_only(const stellarium_volume* volume);

/* Offsets and lengths are multiples of 512 within the volume. What was never written is zeros. */
int stellarium_read(stellarium_volume* volume, uint64_t offset_bytes, void* buffer,
                    uint64_t length_bytes);
int stellarium_write(stellarium_volume* volume, uint64_t offset_bytes, const void* buffer,
                     uint64_t length_bytes);
/* Every write that was completed before is durable on return. */
int stellarium_flush(stellarium_volume* volume);
/* The range reads as zeros afterwards, and takes no space. */
int stellarium_discard(stellarium_volume* volume, uint64_t offset_bytes, uint64_t length_bytes);
/* Has the range in memory, and checked, when it returns; length 0: up to the end. */
int stellarium_prefetch(stellarium_volume* volume, uint64_t offset_bytes, uint64_t length_bytes);

/* ---- Mapping ------------------------------------------------------------------------------- */

enum {
    /* Fills the page tables now instead of page by page. */
    STELLARIUM_MAP_POPULATE = 1
};

typedef struct stellarium_map_options {
    size_t size;
    uint32_t flags;
    /* Mappings of the kernel's that it may take at most, 16 to 32768; 0: 4096. Of what lies
     * scattered, the shortest runs are copied into one memory file to keep to it. All ranges of a
     * process together take at most half of vm.max_map_count. */
    uint32_t max_mappings;
    /* Where in the image: whole pages of 4096 bytes; length 0: up to the end. */
    uint64_t offset_bytes;
    uint64_t length_bytes;
    /* Where in memory; NULL: anywhere. What is mapped there is replaced (as by MAP_FIXED), and not
     * mapped any more after stellarium_unmap(). */
    void* address;
} stellarium_map_options;

typedef struct stellarium_mapping_info {
    size_t size;
    uint64_t mapped_bytes;   /* straight from the store's files: shared with all who map them */
    uint64_t gathered_bytes; /* copied into a memory file, which a daemon lends to all who map it */
    uint64_t mappings;       /* of the kernel's, at most */
} stellarium_mapping_info;

/* Maps a range of an image, volume or snapshot, as it is now, read-only. Every byte of it has been
 * read and checked when this returns. As long as it is mapped, garbage collections leave the
 * store's files that it lies in alone. Through a daemon: images that are marked shareable. The
 * memory may be made writable with mprotect(2): what is written then is this process's own. When
 * the disk cannot give a page any more that memory has let go, touching it raises SIGBUS. */
int stellarium_map(stellarium_store* store, const char* name, const stellarium_map_options* options,
                   stellarium_mapping** mapping);
const void* stellarium_mapping_address(const stellarium_mapping* mapping);
/* In bytes: whole pages, what lies beyond the end is zeros. */
uint64_t stellarium_mapping_size(const stellarium_mapping* mapping);
/* `info->size` is set by you. */
int stellarium_mapping_get_info(const stellarium_mapping* mapping, stellarium_mapping_info* info);
/* The memory is gone. NULL is fine. */
int stellarium_unmap(stellarium_mapping* mapping);

#ifdef __cplusplus
}
#endif

#endif
