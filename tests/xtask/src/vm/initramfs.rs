//! The first file system of a machine: busybox, the modules that make this machine's files visible, and a script that goes over to them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context as _;

use super::kernel::Kernel;
use super::modules::in_order;

/// Under this name the emulator offers the host's files.
pub(super) const HOST_TAG: &str = "host";

/// The machine's own disk.
pub(super) const DISK: &str = "/dev/vda";

/// Modules for them: the way to the host, and a disk over what it lends read-only.
const MODULES: [&str; 8] =
    ["virtio_pci", "9pnet_virtio", "9p", "virtio_blk", "crc32c_generic", "crc32c_intel", "ext4", "overlay"];

/// Everything after `worker` is done by that program; then the machine goes off. The shell stays the first process: it takes in orphans.
const SCRIPT: &str = r#"#!/bin/busybox sh
set -e
for module in $(/bin/busybox cat /order); do /bin/busybox insmod /modules/$module; done
/bin/busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose @TAG@ /host
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t ext4 @DISK@ /over
/bin/busybox mkdir /over/upper /over/work
/bin/busybox mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /root
exec /bin/busybox switch_root /root /bin/busybox sh -c '@WORKER@; busybox sync; busybox poweroff -f'
"#;

/// Writes the archive. `worker` is a command of the host's, as a shell reads it.
pub(super) fn write(kernel: &Kernel, worker: &str, archive: &Path) -> anyhow::Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let dependencies = String::from_utf8(read(&kernel.modules.join("modules.dep"))?)?;
    let busybox = weft_tests_harness::which("busybox").context("no busybox on PATH")?;
    let mut cpio = Cpio::default();
    for folder in ["bin", "dev", "modules", "host", "over", "root"] {
        cpio.folder(folder);
    }
    cpio.program("bin/busybox", &read(&busybox)?);
    let mut order = String::new();
    for file in in_order(&dependencies, &MODULES)? {
        let name = file.rsplit('/').next().unwrap_or(&file);
        cpio.program(&format!("modules/{name}"), &read(&kernel.modules.join(&file))?);
        writeln!(order, "{name}")?;
    }
    cpio.program("order", order.as_bytes());
    cpio.program(
        "init",
        SCRIPT.replace("@TAG@", HOST_TAG).replace("@DISK@", DISK).replace("@WORKER@", worker).as_bytes(),
    );
    fs::write(archive, cpio.end()).with_context(|| format!("cannot write {}", archive.display()))
}

/// An archive in the format that the kernel unpacks: `newc`, each header 13 numbers of 8 hexadecimal digits, each part filled up to 4 bytes.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, 0o100_755, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = 1;
        // Inode, mode, owner, group, links, time, size, four numbers of devices, length of the name with its zero, checksum.
        let numbers = [
            self.entries as usize,
            mode as usize,
            0,
            0,
            links,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for number in numbers {
            self.bytes.extend_from_slice(format!("{number:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.fill();
        self.bytes.extend_from_slice(content);
        self.fill();
    }

    fn fill(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn an_archive_is_what_another_program_unpacks() {
        if !weft_tests_harness::require("vm::initramfs", &["busybox"]) {
            return;
        }
        let mut cpio = Cpio::default();
        cpio.folder("bin");
        cpio.program("bin/odd", b"12345");
        cpio.program("init", b"1234");
        let folder = tempfile::tempdir().unwrap();
        let mut unpack = Command::new("busybox")
            .args(["cpio", "-i"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        unpack.stdin.take().unwrap().write_all(&cpio.end()).unwrap();
        assert!(unpack.wait().unwrap().success());
        assert_eq!(fs::read(folder.path().join("bin/odd")).unwrap(), b"12345");
        assert_eq!(fs::read(folder.path().join("init")).unwrap(), b"1234");
        let mode = fs::metadata(folder.path().join("init")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }
}
