"""What nvcc made of the kernels, read from their object files, without a GPU:
  - no kernel has a stack frame, so that none spills registers or keeps arrays in local memory, on any architecture but
    for the exceptions of the list;
  - kernels whose time is that of moving bytes read 16 bytes at a time, as the PTX of the newest architecture shows;
  - every kernel waits for the one before it (griddepcontrol.wait) before it branches or touches memory but its
    parameters: it may begin before that one has ended. So says the PTX, and so does the machine code of sm_90, where
    loads that are said to be of constant memory might stand before the wait;
  - warpgroups' products (wgmma) of sm_90 are begun several at a time: where something looks at their sums too early, or
    registers are too few, the compiler says in a remark only that it waits for each.
What the list names and is not there any more fails.

    kernel_code.py LIST OBJECT...
LIST has lines `wide SOURCE NAME...` and `frame ARCHITECTURE SOURCE NAME... BYTES`, of the kernels in whose mangled
names all NAMEs are: the kernel's, and those of types that it is a template of. `#` begins a comment.

The formats: a fat binary is a header {u32 magic, u16 version, u16 size, u64 bytes} and entries {u16 kind, u16 version,
u32 header bytes, u64 payload bytes, ..}, kind 1 PTX (whose text zstd may have packed) and 2 an ELF image; an ELF image's
sections .nv.info* hold records {u8 form, u8 attribute, u16 bytes or value}, of which form 4 has that many bytes behind
it and attributes 0x11, 0x12 and 0x23 are {u32 symbol, u32 size of its frame, or of the least or most stack}. An
instruction of sm_90 has 16 bytes, the low 12 bits of which are its operation. Whatever is not as expected fails.
"""
import os
import re
import struct
import subprocess
import sys

FAT_MAGIC, ZSTD_MAGIC = 0xBA55ED50, b"\x28\xb5\x2f\xfd"
PTX, ELF = 1, 2
STACK_ATTRIBUTES = (0x11, 0x12, 0x23)
# From global memory or what may be that.
WIDE_LOAD = re.compile(r"\bld(\.(?!param|shared|local|const)[a-z0-9_:]+)*"
                       r"\.(v4\.[a-z]+32|v2\.[a-z]+64|v8\.[a-z]+16|b128)\b")
WAIT = re.compile(r"^\s*griddepcontrol\.wait\b", re.MULTILINE)
# Of an instruction with which a kernel does or skips something.
EFFECT = re.compile(r"^\s*(@!?%\w+\s+)?(ld(?!\.param)|st|atom|red|cp|bar|barrier|mbarrier|prefetch|bra|brx|ret|exit|"
                    r"call|trap)(\.|\s|;)", re.MULTILINE)
# Operations of sm_90: the wait; BRA, BRX, CALL, RET, EXIT, and those that load, store, copy or add in memory.
SASS_WAIT = 0x82E
SASS_EFFECTS = {0x947, 0x949, 0x944, 0x950, 0x94D, 0x980, 0x981, 0x984, 0x83B, 0x985, 0x986, 0x388, 0x988, 0xFAE, 0x98E}
# A warpgroup's product (HGMMA), and where it begins some or waits for some (WARPGROUP).
SASS_PRODUCT, SASS_PRODUCTS_EDGE = 0x9F0, 0x9C5


class Malformed(Exception):
    pass


class Elf:
    """Sections (name, type, link, contents) of a 64-bit little-endian file."""

    def __init__(self, data):
        if data[:6] != b"\x7fELF\x02\x01":
            raise Malformed("not a 64-bit ELF file")
        at, = struct.unpack_from("<Q", data, 0x28)
        count, names = struct.unpack_from("<HH", data, 0x3C)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, at + 64 * i) for i in range(count)]
        text = headers[names][4]
        self.sections = []
        for name, kind, _, _, offset, size, link, _, _, _ in headers:
            end = data.index(b"\0", text + name)
            contents = b"" if kind == 8 else data[offset:offset + size]
            self.sections.append((data[text + name:end].decode(), kind, link, contents))

    def symbols(self):
        for _, kind, link, contents in self.sections:
            if kind == 2:
                strings = self.sections[link][3]
                return [strings[name:strings.index(b"\0", name)].decode()
                        for name, *_ in struct.iter_unpack("<IBBHQQ", contents)]
        raise Malformed("no symbols")


def images(path):
    """(kind, architecture, contents) of an object file's fat binaries."""
    with open(path, "rb") as file:
        elf = Elf(file.read())
    for name, _, _, data in elf.sections:
        if name != ".nv_fatbin":
            continue
        at = 0
        while at + 16 <= len(data):
            magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
            if magic != FAT_MAGIC:
                raise Malformed(f"{path}: {magic:#x} in place of a fat binary")
            at += header
            end = at + size
            while at < end:
                kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
                architecture, = struct.unpack_from("<I", data, at + 28)
                if kind not in (PTX, ELF) or header < 32 or at + header + size > len(data):
                    raise Malformed(f"{path}: an entry of kind {kind}, header {header}, size {size}")
                yield kind, architecture, data[at + header:at + header + size]
                at += header + size
            at = (end + 7) // 8 * 8


def frames(contents):
    """Kernels of an ELF image, and the bytes of the stacks in it that are not empty, by function."""
    elf = Elf(contents)
    symbols, kernels, found = elf.symbols(), set(), {}
    for name, _, _, data in elf.sections:
        if name.startswith(".text."):
            kernels.add(name[len(".text."):])
        if name != ".nv.info" and not name.startswith(".nv.info."):
            continue
        at = 0
        while at < len(data):
            form, attribute, size = struct.unpack_from("<BBH", data, at)
            at += 4
            if form not in (1, 2, 3, 4):
                raise Malformed(f"a record of form {form} in {name}")
            if form != 4:
                continue
            if attribute in STACK_ATTRIBUTES and size == 8:
                symbol, stack = struct.unpack_from("<II", data, at)
                if stack != 0:
                    found[symbols[symbol]] = max(stack, found.get(symbols[symbol], 0))
            at += size
    return kernels, found


def operations(contents):
    """Kernels of an ELF image of sm_90, and the operations of each in their order."""
    for name, _, _, data in Elf(contents).sections:
        if name.startswith(".text."):
            yield name[len(".text."):], [word & 0xFFF for word, _ in struct.iter_unpack("<QQ", data)]


def begins_with_waiting(code):
    first = next((operation for operation in code if operation == SASS_WAIT or operation in SASS_EFFECTS), None)
    return first == SASS_WAIT


def waits_for_each_product(code):
    return SASS_PRODUCT in code and code.count(SASS_PRODUCT) < code.count(SASS_PRODUCTS_EDGE)


def text_of(contents):
    if contents[:4] == ZSTD_MAGIC:
        contents = subprocess.run(["zstd", "-d", "-q", "-c"], input=contents.rstrip(b"\0") + b"\0" * 8,
                                  capture_output=True).stdout
    text = contents.rstrip(b"\0").decode()
    if ".version" not in text:
        raise Malformed("PTX that cannot be read")
    return text


def entries(text):
    """(mangled name, body) of the kernels of PTX."""
    parts = re.split(r"\.entry\s+([A-Za-z0-9_$]+)", text)
    return list(zip(parts[1::2], parts[2::2]))


def has(mangled, names):
    return all(f"{len(name)}{name}" in mangled for name in names)


def check(lines, objects):
    """Texts of what is wrong, the number of kernels, and whether each reads 16 bytes at a time, by source and name."""
    wrong, count, wide, frames_left = [], 0, {}, [line for line in lines if line[0] == "frame"]
    exceptions, seen = list(frames_left), set()
    for path in objects:
        source = os.path.basename(path).removesuffix(".o")
        architectures, ptx = set(), None
        for kind, architecture, contents in images(path):
            if kind == PTX:
                ptx = text_of(contents)
                continue
            architectures.add(architecture)
            seen.add(f"sm_{architecture}")
            kernels, stacks = frames(contents)
            if not kernels:
                raise Malformed(f"{path}: no kernel for sm_{architecture}")
            count += len(kernels)
            if architecture == 90:
                for name, code in operations(contents):
                    if not begins_with_waiting(code):
                        wrong.append(f"{source}, sm_90: {name} does something before it waits for the kernel before it")
                    if waits_for_each_product(code):
                        wrong.append(f"{source}, sm_90: {name} waits for each of its warpgroups' products")
            for name, size in stacks.items():
                allowed = [line for line in exceptions if line[1] == f"sm_{architecture}" and line[2] == source
                           and has(name, line[3:-1]) and size <= int(line[-1])]
                frames_left = [line for line in frames_left if line not in allowed]
                if not allowed:
                    wrong.append(f"{source}, sm_{architecture}: {name} has a stack frame of {size} bytes")
        if not architectures or ptx is None:
            raise Malformed(f"{path}: no {'PTX' if architectures else 'machine code'}")
        for name, body in entries(ptx):
            wide.setdefault(source, {})[name] = WIDE_LOAD.search(body) is not None
            wait, effect = WAIT.search(body), EFFECT.search(body)
            if wait is None or effect is None or effect.start() < wait.start():
                wrong.append(f"{source}: {name} does not begin with waiting for the kernel before it")
    for _, source, *names in (line for line in lines if line[0] == "wide"):
        found = [is_wide for name, is_wide in wide.get(source, {}).items() if has(name, names)]
        if not found:
            wrong.append(f"{source}: the list has {' '.join(names)}, and there is none")
        elif not any(found):
            wrong.append(f"{source}: {' '.join(names)} reads no 16 bytes at a time")
    wrong += [f"{' '.join(line)}: the list has this exception, and nothing needs it" for line in frames_left
              if line[1] in seen]
    return wrong, count, wide


def main(arguments):
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    with open(arguments[0]) as file:
        lines = [line.split("#")[0].split() for line in file]
    lines = [line for line in lines if line]
    for line in lines:
        if line[0] not in ("wide", "frame") or len(line) < (3 if line[0] == "wide" else 5):
            print(f"FAILED: {arguments[0]}: {' '.join(line)}")
            return 1
    try:
        wrong, count, _ = check(lines, arguments[1:])
    except Malformed as malformed:
        print(f"FAILED: {malformed}")
        return 1
    for line in wrong:
        print(f"FAILED: {line}")
    print(f"{count} kernels in {len(arguments) - 1} files, {len(wrong)} wrong")
    return 1 if wrong or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
