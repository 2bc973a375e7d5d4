/* What must never change of the C interface, as a C compiler sees it, and what each function does
 * with a store of its own. Programs that were compiled against an older header rely on each line of
 * the first part: add to it, and change nothing. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <stellarium.h>
#include <string.h>
#include <unistd.h>

/* ---- Layout (64-bit) ----------------------------------------------------------------------- */

#define OFFSET(type, field, at) \
    _Static_assert(offsetof(type, field) == (at), #type "." #field " has moved")

_Static_assert(STELLARIUM_ABI_VERSION == 1, "the version of this test's layout");

_Static_assert(sizeof(stellarium_store_options) == 32, "stellarium_store_options");
OFFSET(stellarium_store_options, size, 0);
OFFSET(stellarium_store_options, read_only, 8);
OFFSET(stellarium_store_options, collect_garbage, 12);
OFFSET(stellarium_store_options, dirty_bytes, 16);
OFFSET(stellarium_store_options, socket, 24);

_Static_assert(sizeof(stellarium_info) == 568, "stellarium_info");
OFFSET(stellarium_info, size, 0);
OFFSET(stellarium_info, kind, 8);
OFFSET(stellarium_info, attached, 12);
OFFSET(stellarium_info, shareable, 16);
OFFSET(stellarium_info, damaged, 20);
OFFSET(stellarium_info, id, 24);
OFFSET(stellarium_info, size_bytes, 32);
OFFSET(stellarium_info, name, 40);
OFFSET(stellarium_info, parent, 304);

_Static_assert(sizeof(stellarium_volume_options) == 16, "stellarium_volume_options");
OFFSET(stellarium_volume_options, size, 0);
OFFSET(stellarium_volume_options, read_only, 8);

_Static_assert(sizeof(stellarium_map_options) == 40, "stellarium_map_options");
OFFSET(stellarium_map_options, size, 0);
OFFSET(stellarium_map_options, flags, 8);
OFFSET(stellarium_map_options, max_mappings, 12);
OFFSET(stellarium_map_options, offset_bytes, 16);
OFFSET(stellarium_map_options, length_bytes, 24);
OFFSET(stellarium_map_options, address, 32);

_Static_assert(sizeof(stellarium_mapping_info) == 32, "stellarium_mapping_info");
OFFSET(stellarium_mapping_info, size, 0);
OFFSET(stellarium_mapping_info, mapped_bytes, 8);
OFFSET(stellarium_mapping_info, gathered_bytes, 16);
OFFSET(stellarium_mapping_info, mappings, 24);

_Static_assert(STELLARIUM_KIND_IMAGE == 1 && STELLARIUM_KIND_VOLUME == 2 &&
                   STELLARIUM_KIND_SNAPSHOT == 4 && STELLARIUM_MAP_POPULATE == 1,
               "numbers of the interface");

/* ---- Behaviour ----------------------------------------------------------------------------- */

enum { PAGE = 4096, SIZE = 1 << 20 };

static int faults = 0;

static void expect_at(int line, const char* what, long long got, long long wanted) {
    if (got != wanted) {
        fprintf(stderr, "abi_test.c:%d: %s is %lld, not %lld (%s)\n", line, what, got, wanted,
                stellarium_last_error());
        faults++;
    }
}
#define EXPECT(call, wanted) expect_at(__LINE__, #call, (long long)(call), (wanted))

static void check_codes(void) {
    static const struct {
        int code;
        const char* name;
    } codes[] = {{STELLARIUM_OK, "ok"},
                 {STELLARIUM_INVALID_ARGUMENT, "invalid_argument"},
                 {STELLARIUM_NOT_FOUND, "not_found"},
                 {STELLARIUM_ALREADY_EXISTS, "already_exists"},
                 {STELLARIUM_BUSY, "busy"},
                 {STELLARIUM_CORRUPT, "corrupt"},
                 {STELLARIUM_UNSUPPORTED, "unsupported"},
                 {STELLARIUM_IO, "io_error"},
                 {STELLARIUM_NO_SPACE, "no_space"},
                 {STELLARIUM_READ_ONLY, "read_only"},
                 {STELLARIUM_PERMISSION_DENIED, "permission_denied"},
                 {STELLARIUM_LIMIT_EXCEEDED, "limit_exceeded"},
                 {STELLARIUM_UNAVAILABLE, "unavailable"},
                 {STELLARIUM_WOULD_BLOCK, "would_block"},
                 {STELLARIUM_INTERRUPTED, "interrupted"},
                 {STELLARIUM_CANCELLED, "cancelled"},
                 {STELLARIUM_PROTOCOL, "protocol_error"},
                 {STELLARIUM_STALE, "stale"}};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        EXPECT(codes[i].code, -(int)i);
        EXPECT(strcmp(stellarium_error_name(codes[i].code), codes[i].name), 0);
    }
    EXPECT(strcmp(stellarium_error_name(-999), "unknown"), 0);
    EXPECT(strcmp(stellarium_error_name(1), "unknown"), 0);
    EXPECT(strcmp(stellarium_error_advice(-999), ""), 0);
    EXPECT(strlen(stellarium_error_advice(STELLARIUM_BUSY)) > 0, 1);
    EXPECT(stellarium_abi_version(), STELLARIUM_ABI_VERSION);
    EXPECT(strlen(stellarium_version()) > 0, 1);
}

/* An options struct of a later version: what this library does not know must be zero. */
struct later_options {
    stellarium_volume_options known;
    uint64_t added;
};

static void check_sizes(stellarium_store* store) {
    stellarium_volume* volume = NULL;
    struct later_options later;
    memset(&later, 0, sizeof later);
    EXPECT(stellarium_volume_open(store, "a", &later.known, &volume), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(volume == NULL, 1);
    later.known.size = sizeof later;
    EXPECT(stellarium_volume_open(store, "a", &later.known, &volume), STELLARIUM_OK);
    EXPECT(stellarium_volume_close(volume), STELLARIUM_OK);
    later.added = 1;
    EXPECT(stellarium_volume_open(store, "a", &later.known, &volume), STELLARIUM_UNSUPPORTED);
    EXPECT(volume == NULL, 1);
    /* One of an earlier version, which ended with its size. */
    later.known.size = sizeof(size_t);
    EXPECT(stellarium_volume_open(store, "a", &later.known, &volume), STELLARIUM_OK);
    EXPECT(stellarium_volume_read_only(volume), 0);
    EXPECT(stellarium_volume_close(volume), STELLARIUM_OK);

    stellarium_info info;
    memset(&info, 0xee, sizeof info);
    info.size = offsetof(stellarium_info, size_bytes);
    EXPECT(stellarium_get_info(store, "a", &info), STELLARIUM_OK);
    EXPECT(info.size, offsetof(stellarium_info, size_bytes));
    EXPECT(info.kind, STELLARIUM_KIND_VOLUME);
    EXPECT(info.size_bytes == 0xeeeeeeeeeeeeeeeeULL, 1); /* Not the library's to write. */
    info.size = 0;
    EXPECT(stellarium_get_info(store, "a", &info), STELLARIUM_INVALID_ARGUMENT);
    struct {
        stellarium_info known;
        uint64_t added;
    } later_info;
    memset(&later_info, 0xee, sizeof later_info);
    later_info.known.size = sizeof later_info;
    EXPECT(stellarium_get_info(store, "a", &later_info.known), STELLARIUM_OK);
    EXPECT(later_info.known.size, sizeof(stellarium_info)); /* So much is filled. */
    EXPECT(later_info.known.size_bytes, SIZE);
}

static void check_nulls(stellarium_store* store) {
    stellarium_volume* volume = NULL;
    stellarium_mapping* mapping = NULL;
    stellarium_info info = {.size = sizeof info};
    EXPECT(stellarium_open(NULL, NULL, &store), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(store == NULL, 1);
    EXPECT(stellarium_open("x", NULL, NULL), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_connect(NULL, NULL, &store), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_create_store(NULL), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_volume_create(NULL, "a", SIZE), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_clone(NULL, "a", NULL, 1), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_snapshot(NULL, "a", "b"), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_remove(NULL, "a"), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_set_shareable(NULL, "a", 1), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_get_info(NULL, "a", &info), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_list(NULL, 7, NULL, NULL), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_volume_open(NULL, "a", NULL, &volume), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_read(NULL, 0, NULL, 0), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_write(NULL, 0, NULL, 0), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_flush(NULL), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_discard(NULL, 0, 0), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_prefetch(NULL, 0, 0), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_map(NULL, "a", NULL, &mapping), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_mapping_get_info(NULL, NULL), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_close(NULL), STELLARIUM_OK);
    EXPECT(stellarium_volume_close(NULL), STELLARIUM_OK);
    EXPECT(stellarium_unmap(NULL), STELLARIUM_OK);
    EXPECT(stellarium_volume_size(NULL), 0);
    EXPECT(stellarium_mapping_size(NULL), 0);
    EXPECT(stellarium_mapping_address(NULL) == NULL, 1);
    EXPECT(stellarium_through_daemon(NULL), 0);
}

static void check_disk(stellarium_store* store) {
    static unsigned char page[PAGE], back[SIZE], zeros[SIZE];
    stellarium_volume *volume = NULL, *second = NULL;
    memset(page, 0x5a, sizeof page);
    EXPECT(stellarium_volume_open(store, "a", NULL, &volume), STELLARIUM_OK);
    EXPECT(stellarium_volume_size(volume), SIZE);
    EXPECT(stellarium_write(volume, 2 * PAGE, page, PAGE), STELLARIUM_OK);
    EXPECT(stellarium_write(volume, SIZE - 512, page, 512), STELLARIUM_OK);
    EXPECT(stellarium_read(volume, 0, back, SIZE), STELLARIUM_OK);
    EXPECT(memcmp(back + 2 * PAGE, page, PAGE), 0);
    EXPECT(memcmp(back, zeros, 2 * PAGE), 0);
    EXPECT(memcmp(back + SIZE - 512, page, 512), 0);
    EXPECT(stellarium_discard(volume, SIZE - 512, 512), STELLARIUM_OK);
    EXPECT(stellarium_flush(volume), STELLARIUM_OK);
    EXPECT(stellarium_prefetch(volume, 0, 0), STELLARIUM_OK);
    EXPECT(stellarium_prefetch(volume, PAGE, PAGE), STELLARIUM_OK);
    EXPECT(stellarium_read(volume, 0, back, 0), STELLARIUM_OK);
    EXPECT(stellarium_read(volume, 1, back, 512), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_read(volume, 0, back, 100), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_read(volume, SIZE, back, 512), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_write(volume, SIZE - 512, back, PAGE), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_discard(volume, ~(uint64_t)511, 512), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(strstr(stellarium_last_error(), "512") != NULL, 1);
    EXPECT(stellarium_volume_open(store, "a", NULL, &second), STELLARIUM_BUSY);
    EXPECT(stellarium_volume_close(volume), STELLARIUM_OK);

    const stellarium_volume_options read_only = {.size = sizeof read_only, .read_only = 1};
    EXPECT(stellarium_volume_open(store, "a", &read_only, &volume), STELLARIUM_OK);
    EXPECT(stellarium_volume_read_only(volume), 1);
    EXPECT(stellarium_write(volume, 0, page, 512), STELLARIUM_READ_ONLY);
    EXPECT(stellarium_discard(volume, 0, 512), STELLARIUM_READ_ONLY);
    EXPECT(stellarium_read(volume, 2 * PAGE, back, PAGE), STELLARIUM_OK);
    EXPECT(memcmp(back, page, PAGE), 0);
    EXPECT(stellarium_volume_close(volume), STELLARIUM_OK);
}

struct names {
    char text[1024];
    int left;
};

static int collect(void* user, const stellarium_info* info) {
    struct names* names = user;
    strcat(names->text, info->name);
    strcat(names->text, " ");
    return --names->left == 0;
}

static void check_names(stellarium_store* store) {
    const char* const clones[] = {"b", "c"};
    stellarium_info info = {.size = sizeof info};
    struct names names = {"", 100};
    EXPECT(stellarium_volume_create(store, "a", SIZE), STELLARIUM_ALREADY_EXISTS);
    EXPECT(stellarium_volume_create(store, "../a", SIZE), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_snapshot(store, "a", "s"), STELLARIUM_OK);
    EXPECT(stellarium_clone(store, "a@s", clones, 2), STELLARIUM_OK);
    EXPECT(stellarium_clone(store, "a", clones, 2), STELLARIUM_ALREADY_EXISTS);
    EXPECT(stellarium_clone(store, "nothing", clones, 2), STELLARIUM_NOT_FOUND);
    EXPECT(stellarium_list(store, 7, collect, &names), STELLARIUM_OK);
    EXPECT(strcmp(names.text, "a b c a@s "), 0);
    names = (struct names){"", 2};
    EXPECT(stellarium_list(store, STELLARIUM_KIND_VOLUME, collect, &names), STELLARIUM_OK);
    EXPECT(strcmp(names.text, "a b "), 0);
    EXPECT(stellarium_get_info(store, "b", &info), STELLARIUM_OK);
    EXPECT(strcmp(info.parent, "a@s"), 0);
    EXPECT(info.attached, 0);
    EXPECT(stellarium_get_info(store, "a@s", &info), STELLARIUM_OK);
    EXPECT(info.kind, STELLARIUM_KIND_SNAPSHOT);
    EXPECT(stellarium_get_info(store, "nothing", &info), STELLARIUM_NOT_FOUND);
    EXPECT(stellarium_set_shareable(store, "a", 1), STELLARIUM_NOT_FOUND); /* It is no image. */
    EXPECT(stellarium_remove(store, "c"), STELLARIUM_OK);
    EXPECT(stellarium_remove(store, "c"), STELLARIUM_NOT_FOUND);
    EXPECT(stellarium_remove(store, "a@nothing"), STELLARIUM_NOT_FOUND);
}

static void check_mapping(stellarium_store* store) {
    static unsigned char page[PAGE];
    stellarium_mapping* mapping = NULL;
    stellarium_mapping_info info = {.size = sizeof info};
    stellarium_map_options options = {.size = sizeof options};
    memset(page, 0x5a, sizeof page);
    EXPECT(stellarium_map(store, "a@s", NULL, &mapping), STELLARIUM_OK);
    const unsigned char* bytes = stellarium_mapping_address(mapping);
    EXPECT(stellarium_mapping_size(mapping), SIZE);
    EXPECT(memcmp(bytes + 2 * PAGE, page, PAGE), 0);
    EXPECT(bytes[0], 0);
    EXPECT(stellarium_mapping_get_info(mapping, &info), STELLARIUM_OK);
    EXPECT(info.mapped_bytes, PAGE);
    EXPECT(info.gathered_bytes, 0);
    EXPECT(info.mappings, 3);
    EXPECT(stellarium_unmap(mapping), STELLARIUM_OK);

    options.offset_bytes = 2 * PAGE;
    options.length_bytes = PAGE;
    options.flags = STELLARIUM_MAP_POPULATE;
    EXPECT(stellarium_map(store, "b", &options, &mapping), STELLARIUM_OK);
    EXPECT(stellarium_mapping_size(mapping), PAGE);
    EXPECT(memcmp(stellarium_mapping_address(mapping), page, PAGE), 0);
    EXPECT(stellarium_unmap(mapping), STELLARIUM_OK);
    options.flags = 1u << 31;
    EXPECT(stellarium_map(store, "b", &options, &mapping), STELLARIUM_UNSUPPORTED);
    options.flags = 0;
    options.max_mappings = 1;
    EXPECT(stellarium_map(store, "b", &options, &mapping), STELLARIUM_INVALID_ARGUMENT);
    options.max_mappings = 0;
    options.offset_bytes = 1;
    EXPECT(stellarium_map(store, "b", &options, &mapping), STELLARIUM_INVALID_ARGUMENT);
    EXPECT(stellarium_map(store, "nothing", NULL, &mapping), STELLARIUM_NOT_FOUND);
    EXPECT(mapping == NULL, 1);
}

int main(void) {
    const char* base = getenv("TMPDIR");
    char folder[4096];
    char directory[4200];
    stellarium_store *store = NULL, *second = NULL;
    snprintf(folder, sizeof folder, "%s/stellarium-abi-XXXXXX", base != NULL ? base : "/var/tmp");
    if (mkdtemp(folder) == NULL) {
        perror(folder);
        return 1;
    }
    snprintf(directory, sizeof directory, "%s/store", folder);

    check_codes();
    check_nulls(store);
    EXPECT(stellarium_open(directory, NULL, &store), STELLARIUM_NOT_FOUND);
    EXPECT(store == NULL, 1);
    EXPECT(strstr(stellarium_last_error(), directory) != NULL, 1);
    EXPECT(stellarium_connect(directory, NULL, &store), STELLARIUM_UNAVAILABLE);
    EXPECT(stellarium_create_store(directory), STELLARIUM_OK);
    EXPECT(stellarium_create_store(directory) != STELLARIUM_OK, 1);
    EXPECT(stellarium_open(directory, NULL, &store), STELLARIUM_OK);
    if (store != NULL) {
        EXPECT(stellarium_through_daemon(store), 0);
        EXPECT(stellarium_open(directory, NULL, &second), STELLARIUM_BUSY);
        EXPECT(stellarium_volume_create(store, "a", SIZE), STELLARIUM_OK);
        check_disk(store);
        check_sizes(store);
        check_names(store);
        check_mapping(store);
        EXPECT(stellarium_close(store), STELLARIUM_OK);
    }
    const stellarium_store_options read_only = {.size = sizeof read_only, .read_only = 1};
    EXPECT(stellarium_open(directory, &read_only, &store), STELLARIUM_OK);
    EXPECT(stellarium_volume_create(store, "new", SIZE), STELLARIUM_READ_ONLY);
    check_mapping(store);
    EXPECT(stellarium_close(store), STELLARIUM_OK);

    char command[4300];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    EXPECT(system(command), 0);
    return faults == 0 ? 0 : 1;
}
