//! Debian's kernel package, downloaded and unpacked without being installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};

use crate::images::download;
use crate::steps::{quiet, step, target};

/// The package that stands for the newest kernel of a Debian, and what Debian 12's is.
const NEWEST: &str = "linux-image-amd64";
const SERIES: &str = "6.1.";

/// A kernel on disk.
pub(super) struct Kernel {
    /// As `uname -r` says it.
    pub(super) release: String,
    pub(super) image: PathBuf,
    /// Its folder of modules, with depmod's index.
    pub(super) modules: PathBuf,
}

/// Finds, downloads and unpacks it; what was unpacked before stays.
pub(super) fn fetch() -> anyhow::Result<Kernel> {
    // The list of packages may be missing, or name one that is offered no more.
    find().or_else(|first| {
        quiet(Command::new("apt-get").args(["update", "-qq"]))?;
        find().with_context(|| format!("at first: {first:#}"))
    })
}

fn find() -> anyhow::Result<Kernel> {
    let package = newest()?;
    let release =
        package.strip_prefix("linux-image-").context("a kernel's package has another name")?.to_owned();
    ensure!(release.starts_with(SERIES), "Debian 12's kernel is a {SERIES}*, but {NEWEST} is {release} here");
    let folder = target("vm")?.join(format!("kernel-{release}"));
    if !folder.is_dir() {
        step(&format!("unpack Linux {release}"), || unpack(&package, &release, &folder))?;
    }
    let modules = folder.join("lib/modules").join(&release);
    Ok(Kernel { image: folder.join("boot").join(format!("vmlinuz-{release}")), modules, release })
}

fn newest() -> anyhow::Result<String> {
    let said = quiet(Command::new("apt-cache").args(["show", "--no-all-versions", NEWEST]))?;
    dependency(&said).with_context(|| format!("{NEWEST} depends on no kernel"))
}

/// The kernel that the package's record depends on.
fn dependency(record: &str) -> Option<String> {
    let depends = record.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let words = depends.split([',', ' ']);
    words.map(str::trim).find(|word| word.starts_with("linux-image-")).map(str::to_owned)
}

fn unpack(package: &str, release: &str, folder: &Path) -> anyhow::Result<()> {
    let packages = target("vm")?.join("packages");
    fs::create_dir_all(&packages)?;
    let archive = download(&packages, package)?;
    // Under another name until it is whole: what has the name is used.
    let work = folder.with_extension("unpacking");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let mut tar = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(&archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb")?;
    let stream = tar.stdout.take().context("dpkg-deb has no output")?;
    for entry in tar::Archive::new(stream).entries()? {
        let mut entry = entry?;
        if wanted(&entry.path()?) {
            entry.unpack_in(&work).context("cannot unpack the kernel")?;
        }
    }
    let status = tar.wait()?;
    if !status.success() {
        bail!("dpkg-deb cannot read {} ({status})", archive.display());
    }
    quiet(Command::new("depmod").arg("--basedir").arg(&work).arg(release))?;
    fs::rename(&work, folder).with_context(|| format!("cannot name {}", folder.display()))
}

/// The kernel itself and the modules that a machine without devices can use: a fifth of the package.
fn wanted(path: &Path) -> bool {
    let path = path.strip_prefix(".").unwrap_or(path);
    let words: Vec<&str> = path.iter().filter_map(|word| word.to_str()).collect();
    match words.as_slice() {
        ["boot", file] => file.starts_with("vmlinuz-"),
        ["lib", "modules", _, "kernel", "drivers", "net", _] => {
            path.extension().is_some_and(|end| end == "ko")
        }
        ["lib", "modules", _, "kernel", "drivers", "net", "vxlan", ..] => true,
        ["lib", "modules", _, "kernel", "drivers", kind, ..] => ["virtio", "block", "char"].contains(kind),
        ["lib", "modules", _, "kernel", kind, ..] => *kind != "sound",
        ["lib", "modules", ..] => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_what_the_package_depends_on() {
        let record = "Package: linux-image-amd64\nSource: x\nDepends: initramfs-tools, linux-image-6.1.0-56-amd64 (= 6.1.192-2)\n";
        assert_eq!(dependency(record).as_deref(), Some("linux-image-6.1.0-56-amd64"));
        assert_eq!(dependency("Package: x\nDepends: libc6\n"), None);
    }

    #[test]
    fn modules_for_devices_are_left_out() {
        let kernel = "./lib/modules/6.1.0-56-amd64/kernel";
        for path in [
            "drivers/net/veth.ko",
            "drivers/net/vxlan/vxlan.ko",
            "net/sctp/sctp.ko",
            "drivers/virtio/virtio.ko",
            "lib/crc16.ko",
            "arch/x86/crypto/a.ko",
        ] {
            assert!(wanted(Path::new(&format!("{kernel}/{path}"))), "{path}");
        }
        for path in ["drivers/net/wireless/a/b.ko", "drivers/gpu/drm/drm.ko", "sound/core/snd.ko"] {
            assert!(!wanted(Path::new(&format!("{kernel}/{path}"))), "{path}");
        }
        assert!(wanted(Path::new("./boot/vmlinuz-6.1")) && !wanted(Path::new("./boot/System.map-6.1")));
        assert!(!wanted(Path::new("./usr/share/doc/x")));
    }
}
