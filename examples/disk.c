/* A disk for a virtual machine, in C: opens a store, or connects to the daemon that holds it,
 * clones a volume, and reads and writes the clone.
 *
 *     cc -o disk disk.c $(pkg-config --cflags --libs stellarium)
 *     ./disk STORE-DIRECTORY
 *
 * Where there is no store yet, one is made. */
#include <stdio.h>
#include <stdlib.h>
#include <stellarium.h>
#include <string.h>

#define PAGE 4096

static int failed(const char* what) {
    fprintf(stderr, "disk: %s: %s\n", what, stellarium_last_error());
    return 1;
}

/* The store itself, or through its daemon. */
static int open_store(const char* directory, stellarium_store** store) {
    int result = stellarium_open(directory, NULL, store);
    if (result == STELLARIUM_NOT_FOUND && stellarium_create_store(directory) == STELLARIUM_OK)
        result = stellarium_open(directory, NULL, store);
    if (result == STELLARIUM_BUSY)
        result = stellarium_connect(directory, NULL, store);
    return result;
}

static int print(void* user, const stellarium_info* info) {
    (void)user;
    printf("%s, %llu bytes%s%s\n", info->name, (unsigned long long)info->size_bytes,
           info->parent[0] != '\0' ? ", of " : "", info->parent);
    return 0;
}

/* Writes a page of a fresh clone and reads it back; the clone is gone afterwards. */
static int use(stellarium_store* store) {
    static unsigned char written[PAGE], back[PAGE];
    const char* const names[] = {"example-vm"};
    stellarium_volume* disk = NULL;

    int result = stellarium_volume_create(store, "example", 1 << 20);
    if (result != STELLARIUM_OK && result != STELLARIUM_ALREADY_EXISTS)
        return failed("create a volume");
    if (stellarium_clone(store, "example", names, 1) != STELLARIUM_OK)
        return failed("clone it");
    if (stellarium_list(store, STELLARIUM_KIND_VOLUME, print, NULL) != STELLARIUM_OK)
        return failed("list the volumes");
    if (stellarium_volume_open(store, names[0], NULL, &disk) != STELLARIUM_OK)
        return failed("open the clone");

    memset(written, 0x5a, sizeof written);
    if (stellarium_write(disk, PAGE, written, sizeof written) != STELLARIUM_OK ||
        stellarium_flush(disk) != STELLARIUM_OK || /* durable from here on */
        stellarium_read(disk, PAGE, back, sizeof back) != STELLARIUM_OK)
        return failed("write and read");
    if (memcmp(written, back, sizeof back) != 0) {
        fprintf(stderr, "disk: what was read is not what was written\n");
        return 1;
    }
    if (stellarium_volume_close(disk) != STELLARIUM_OK)
        return failed("close the clone");
    if (stellarium_remove(store, names[0]) != STELLARIUM_OK)
        return failed("remove the clone");
    return 0;
}

int main(int argc, char** argv) {
    stellarium_store* store = NULL;
    if (argc != 2) {
        fprintf(stderr, "usage: disk STORE-DIRECTORY\n");
        return 2;
    }
    if (open_store(argv[1], &store) != STELLARIUM_OK)
        return failed("open the store");
    const int status = use(store);
    if (stellarium_close(store) != STELLARIUM_OK && status == 0)
        return failed("close the store");
    return status;
}
