//! A container's file system, built by the container's own first process in its own mount namespace.
//!
//! Sources are opened as detached mounts while the node's tree is still the root; targets are resolved after
//! `pivot_root`, so no link in an image leads out of it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use weft_agent_runtime_init::wire::{Mount, Propagation, Root, Start};

use crate::sys;

/// Says what was being done.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, String>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, String> {
        self.map_err(|error| format!("{}: {error}", what()))
    }
}

const NONE: Option<&str> = None;
/// The size of /dev, which holds nodes and links only.
const DEV_OPTIONS: &str = "mode=755,size=65536k";
/// Group 5 is `tty` wherever the group exists.
const DEVPTS_OPTIONS: &str = "newinstance,ptmxmode=0666,mode=0620,gid=5";

/// So many names of 64 digits, and two long paths, fit the page of options that the kernel takes.
const MAX_LAYERS_IN_OPTIONS: usize = 40;

/// Name, major and minor number.
const NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];
const MASKED_SYS: [&str; 1] = ["/sys/devices/virtual/powercap"];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

struct Bind<'a> {
    tree: OwnedFd,
    folder: bool,
    mount: &'a Mount,
}

struct Node {
    name: PathBuf,
    mode: u32,
    device: u64,
}

/// Builds the file system and makes it the root of the calling process.
pub(crate) fn enter(spec: &Start) -> Result<(), String> {
    let binds: Vec<Bind<'_>> = spec.mounts.iter().map(source).collect::<Result<_, _>>()?;
    let shm = clone_tree(&spec.shm)?;
    let views = cgroup_views(spec)?;
    let nodes = if spec.privileged { host_nodes(Path::new("/dev"), Path::new("")) } else { Vec::new() };

    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .context(|| "make the mount tree a slave".to_owned())?;
    pivot(&spec.root, spec.privileged)?;

    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    special("proc", "/proc", quiet, NONE)?;
    let sys_flags = if spec.privileged { quiet } else { quiet | MsFlags::MS_RDONLY };
    special("sysfs", "/sys", sys_flags, NONE)?;
    mount_cgroups(views)?;
    devices(nodes)?;
    attach(&shm, Path::new("/dev/shm"), true)?;
    for bind in binds {
        attach(&bind.tree, &bind.mount.target, bind.folder)?;
    }
    if !spec.privileged {
        MASKED.iter().chain(&MASKED_SYS).try_for_each(|path| mask(path))?;
        READ_ONLY.iter().try_for_each(|path| protect(path))?;
    }
    Ok(())
}

/// Makes the root read-only; the last step, after the working folder has been made.
pub(crate) fn seal(spec: &Start) -> Result<(), String> {
    if !spec.root.read_only {
        return Ok(());
    }
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    if !spec.privileged {
        flags |= MsFlags::MS_NODEV;
    }
    mount(NONE, "/", NONE, flags, NONE).context(|| "make the root read-only".to_owned())
}

fn clone_tree(path: &Path) -> Result<OwnedFd, String> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    open_tree(CWD, path, flags).context(|| format!("mount source {}", path.display()))
}

fn source(mount: &Mount) -> Result<Bind<'_>, String> {
    let folder =
        fs::metadata(&mount.source).context(|| format!("mount source {}", mount.source.display()))?.is_dir();
    let tree = clone_tree(&mount.source)?;
    let mut set = 0;
    if mount.read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    if !mount.devices {
        set |= libc::MOUNT_ATTR_NODEV;
    }
    let propagation = match mount.propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    };
    sys::mount_setattr(tree.as_fd(), set, propagation)
        .context(|| format!("set the attributes of mount {}", mount.target.display()))?;
    Ok(Bind { tree, folder, mount })
}

fn cgroup_views(spec: &Start) -> Result<Vec<(String, OwnedFd)>, String> {
    let mut views = Vec::new();
    for (name, folder) in &spec.cgroups.view {
        let tree = clone_tree(folder)?;
        let quiet = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        let set = if spec.privileged { quiet } else { quiet | libc::MOUNT_ATTR_RDONLY };
        sys::mount_setattr(tree.as_fd(), set, libc::MS_PRIVATE)
            .context(|| format!("set the attributes of cgroup {}", folder.display()))?;
        views.push((name.clone(), tree));
    }
    Ok(views)
}

/// Mounts the overlay and makes it the root.
fn pivot(root: &Root, devices: bool) -> Result<(), String> {
    let target = root.folder.join("root");
    std::env::set_current_dir(&root.layers).context(|| format!("enter {}", root.layers.display()))?;
    let mounted = if root.lower.len() > MAX_LAYERS_IN_OPTIONS {
        overlay_by_parts(root, &target, devices)
    } else {
        overlay(root, &target, devices)
    };
    mounted.context(|| format!("mount the image of {} layers", root.lower.len()))?;
    std::env::set_current_dir(&target).context(|| "enter the root".to_owned())?;
    nix::unistd::pivot_root(".", ".").context(|| "change the root".to_owned())?;
    umount2(".", MntFlags::MNT_DETACH).context(|| "leave the node's root".to_owned())?;
    std::env::set_current_dir("/").context(|| "enter the new root".to_owned())
}

/// Layers are named relative to their folder, because the kernel takes at most a page of options.
fn overlay(root: &Root, target: &Path, devices: bool) -> io::Result<()> {
    let part = |name: &str| escape(&root.folder.join(name).to_string_lossy());
    let options =
        format!("lowerdir={},upperdir={},workdir={}", root.lower.join(":"), part("upper"), part("work"));
    let flags = if devices { MsFlags::empty() } else { MsFlags::MS_NODEV };
    let mount = |options: &str| mount(Some("overlay"), target, Some("overlay"), flags, Some(options));
    // A container's root outlives no crash of the machine, so it need never be synced. Linux before 5.10 can't do without.
    mount(&format!("{options},volatile")).or_else(|_refused| mount(&options))?;
    Ok(())
}

/// One call per layer: Linux 6.7 and later.
fn overlay_by_parts(root: &Root, target: &Path, devices: bool) -> io::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    root.lower.iter().try_for_each(|layer| fsconfig_set_string(&context, "lowerdir+", layer.as_str()))?;
    fsconfig_set_string(&context, "upperdir", root.folder.join("upper"))?;
    fsconfig_set_string(&context, "workdir", root.folder.join("work"))?;
    fsconfig_set_flag(&context, "volatile")?;
    fsconfig_create(&context)?;
    let flags = if devices { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_NODEV };
    let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// Overlay's options end at a comma and its layers at a colon.
fn escape(path: &str) -> String {
    path.replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:")
}

/// Mounts a kernel file system on a folder that no image may have replaced by a link.
fn special(kind: &str, target: &str, flags: MsFlags, options: Option<&str>) -> Result<(), String> {
    make_folder(target)?;
    mount(Some(kind), target, Some(kind), flags, options).context(|| format!("mount {kind} on {target}"))
}

fn make_folder(target: &str) -> Result<(), String> {
    match fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(format!("{target} in the image is no folder")),
        Err(_) => DirBuilder::new().mode(0o755).create(target).context(|| format!("make {target}")),
    }
}

fn mount_cgroups(views: Vec<(String, OwnedFd)>) -> Result<(), String> {
    let base = Path::new("/sys/fs/cgroup");
    if let [(name, tree)] = views.as_slice()
        && name.is_empty()
    {
        return attach(tree, base, true);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), base, Some("tmpfs"), flags, Some("mode=755,size=64k"))
        .context(|| "mount a folder for cgroups".to_owned())?;
    for (name, tree) in views {
        attach(&tree, &base.join(name), true)?;
    }
    mount(NONE, base, NONE, flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, NONE)
        .context(|| "protect the folder of cgroups".to_owned())
}

/// The node's devices, for privileged containers.
fn host_nodes(folder: &Path, relative: &Path) -> Vec<Node> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (Ok(meta), name) = (entry.path().symlink_metadata(), relative.join(entry.file_name())) else {
            continue;
        };
        let kind = meta.file_type();
        if kind.is_dir() {
            let own = ["pts", "shm", "mqueue", "hugepages"].iter().any(|own| name == Path::new(own));
            if !own {
                found.extend(host_nodes(&entry.path(), &name));
            }
        } else if (kind.is_char_device() || kind.is_block_device())
            && name != Path::new("console")
            && name != Path::new("ptmx")
        {
            found.push(Node { name, mode: meta.mode(), device: meta.rdev() });
        }
    }
    found
}

fn devices(host: Vec<Node>) -> Result<(), String> {
    special("tmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME, Some(DEV_OPTIONS))?;
    for (name, major, minor) in NODES {
        node(Path::new(name), libc::S_IFCHR | 0o666, makedev(major, minor))?;
    }
    for Node { name, mode, device } in host {
        let known = NODES.iter().any(|(node, ..)| Path::new(node) == name);
        if !known {
            node(&name, mode, device)?;
        }
    }
    for (target, name) in LINKS {
        std::os::unix::fs::symlink(target, Path::new("/dev").join(name))
            .context(|| format!("link /dev/{name}"))?;
    }
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    special("devpts", "/dev/pts", quiet, Some(DEVPTS_OPTIONS))?;
    special("mqueue", "/dev/mqueue", quiet | MsFlags::MS_NODEV, NONE)?;
    make_folder("/dev/shm")
}

fn node(name: &Path, mode: u32, device: u64) -> Result<(), String> {
    let path = Path::new("/dev").join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).context(|| format!("make {}", parent.display()))?;
    }
    let (kind, permissions) = (SFlag::from_bits_truncate(mode), Mode::from_bits_truncate(mode));
    mknod(&path, kind, permissions, device).context(|| format!("make the device {}", path.display()))?;
    // mknod's mode is cut by the umask.
    fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o7777))
        .context(|| format!("open {}", path.display()))
}

/// Attaches a detached mount, making its target if missing.
fn attach(tree: &OwnedFd, target: &Path, folder: bool) -> Result<(), String> {
    let say = || format!("mount on {}", target.display());
    if folder {
        fs::create_dir_all(target).context(say)?;
    } else if !target.exists() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).context(say)?;
        }
        OpenOptions::new().create(true).append(true).open(target).context(say)?;
    }
    let target = fs::canonicalize(target).context(say)?;
    if target.starts_with("/proc") {
        return Err(format!("{:?} cannot be mounted because it is inside /proc", target));
    }
    move_mount(tree, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context(say)
}

fn mask(path: &str) -> Result<(), String> {
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
    let result = if meta.is_dir() {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0k,nr_inodes=2"))
    } else {
        mount(Some("/dev/null"), path, NONE, MsFlags::MS_BIND, NONE)
    };
    result.context(|| format!("mask {path}"))
}

fn protect(path: &str) -> Result<(), String> {
    if !Path::new(path).exists() {
        return Ok(());
    }
    let say = || format!("protect {path}");
    mount(Some(path), path, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).context(say)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(NONE, path, NONE, flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND, NONE).context(say)
}

/// Makes a container's working folder if the image lacks it.
pub(crate) fn working_folder(path: &Path) -> Result<(), String> {
    match fs::create_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.context(|| format!("make the working folder {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_options_survive_odd_folders() {
        assert_eq!(escape("/a,b:c\\d"), "/a\\,b\\:c\\\\d");
    }
}
