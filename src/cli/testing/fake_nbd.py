#!/usr/bin/env python3
"""A qemu-nbd that misbehaves: it takes the socket that systemd's activation hands over, agrees on
an export of 4 MiB, and answers as FAKE_NBD says:

    well     as a good server: the pattern of page numbers
    eio      an I/O error for the second read
    close    gone in the middle of the second read's data
    garbage  bytes that are no reply, for the second read
    handle   the reply to another read than was sent
    short    the second read's data has half of its bytes, then nothing more comes
    silent   no answer to the second read
    nothing  an answer about holes that tells of no extent
    beyond   extents that reach far behind the export's end
    refuse   no export
    die      an exit with a message before anything is said
"""
import os
import signal
import socket
import struct
import sys

SIZE = 4 << 20
MODE = os.environ.get("FAKE_NBD", "well")
NBD_REP_ERR_UNKNOWN = 0x80000006


def main():
    if MODE == "die":
        sys.exit("fake: the image is on fire")
    listener = socket.socket(fileno=3)
    peer, _ = listener.accept()
    stream = peer.makefile("rwb")

    def send(data):
        stream.write(data)
        stream.flush()

    def take(count):
        data = stream.read(count)
        if len(data) < count:
            sys.exit(0)
        return data

    send(b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3))
    take(4)
    structured = False
    while True:
        magic, option, length = struct.unpack(">QII", take(16))
        data = take(length)
        reply = lambda kind, payload=b"": send(struct.pack(  # noqa: E731
            ">QIII", 0x3e889045565a9, option, kind, len(payload)) + payload)
        if option == 8:  # Structured replies.
            structured = True
            reply(1)
        elif option == 10:  # The meta context that is asked for: base:allocation.
            reply(4, struct.pack(">I", 1) + b"base:allocation")
            reply(1)
        elif option in (6, 7):  # Info, go.
            if MODE == "refuse":
                reply(NBD_REP_ERR_UNKNOWN)
                continue
            reply(3, struct.pack(">HQH", 0, SIZE, 0x3))
            reply(1)
            if option == 7:
                break
        elif option == 2:
            reply(1)
            return
        else:
            reply(0x80000001)

    def chunk(flags, kind, handle, payload):
        send(struct.pack(">IHHQI", 0x668e33ef, flags, kind, handle, len(payload)) + payload)

    reads = 0
    while True:
        _, _, command, handle, offset, length = struct.unpack(">IHHQQI", take(28))
        if command == 2:
            return
        if command == 7:
            if MODE == "nothing":
                chunk(1, 5, handle, struct.pack(">I", 1))
            else:
                reach = 0xffffff00 if MODE == "beyond" else length
                chunk(1, 5, handle, struct.pack(">III", 1, reach, 0))
            continue
        reads += 1
        data = b"".join(struct.pack("<Q", (offset + at) // 4096 + 1) * 512
                        for at in range(0, length, 4096))[:length]
        bad = reads == 2
        if bad and MODE == "eio":
            chunk(1, 0x8001, handle, struct.pack(">IH", 5, 0))
        elif bad and MODE == "garbage":
            send(b"no reply at all, and quite a lot of it" * 10)
        elif bad and MODE == "silent":
            signal.pause()
        else:
            handle ^= 0x10000 if bad and MODE == "handle" else 0
            if not structured:
                send(struct.pack(">IIQ", 0x67446698, 0, handle))
            else:
                send(struct.pack(">IHHQI", 0x668e33ef, 1, 1, handle, 8 + length))
                send(struct.pack(">Q", offset))
            if bad and MODE in ("close", "short"):
                send(data[:length // 2])
                if MODE == "close":
                    return
                signal.pause()
            send(data)


main()
