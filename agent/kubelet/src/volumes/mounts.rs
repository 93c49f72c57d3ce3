//! A container's volume mounts → the runtime's mounts; subPaths are opened without ever leaving their volume.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};
use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use weft_agent_runtime::{Mount, Propagation};

use super::{Mounted, pod_dir, remove};
use crate::env;
use crate::shared::Shared;

/// A mount that can't be made (upstream's `CreateContainerConfigError`).
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot find volume \"{0}\" to mount into container \"{1}\"")]
    NoVolume(String, String),
    #[error("subPath \"{path}\" of volume \"{volume}\" must be relative and must not contain '..'")]
    SubPath { volume: String, path: String },
    #[error("failed to prepare subPath for volumeMount \"{volume}\" of container \"{container}\": {reason}")]
    Prepare { volume: String, container: String, reason: String },
}

/// The mounts of a container's volumes.
pub(crate) fn of(
    shared: &Shared,
    pod: &Pod,
    container: &Container,
    mounted: &Mounted,
    variables: &[(String, String)],
) -> Result<Vec<Mount>, Error> {
    let variables: BTreeMap<String, String> = variables.iter().cloned().collect();
    let binds = pod_dir(shared, pod).join("volume-subpaths");
    let mut mounts = Vec::new();
    for (index, wanted) in container.volume_mounts.iter().flatten().enumerate() {
        let volume = mounted
            .paths
            .get(&wanted.name)
            .ok_or_else(|| Error::NoVolume(wanted.name.clone(), container.name.clone()))?;
        let host_path = match sub_path(wanted, &variables)? {
            None => volume.clone(),
            Some(path) => {
                let bind = binds.join(&wanted.name).join(&container.name).join(index.to_string());
                bind_below(volume, &path, &bind).map_err(|source| Error::Prepare {
                    volume: wanted.name.clone(),
                    container: container.name.clone(),
                    reason: source.to_string(),
                })?
            }
        };
        mounts.push(Mount {
            host_path,
            container_path: absolute(&wanted.mount_path),
            read_only: wanted.read_only.unwrap_or(false),
            propagation: propagation(wanted),
        });
    }
    Ok(mounts)
}

fn absolute(path: &str) -> PathBuf {
    Path::new("/").join(path)
}

fn propagation(wanted: &VolumeMount) -> Propagation {
    match wanted.mount_propagation.as_deref() {
        Some("HostToContainer") => Propagation::HostToContainer,
        Some("Bidirectional") => Propagation::Bidirectional,
        _ => Propagation::Private,
    }
}

fn sub_path(wanted: &VolumeMount, variables: &BTreeMap<String, String>) -> Result<Option<String>, Error> {
    let plain = wanted.sub_path.clone().filter(|p| !p.is_empty());
    let expression = wanted.sub_path_expr.as_ref().filter(|p| !p.is_empty());
    let Some(path) = plain.or_else(|| expression.map(|e| env::expand(e, variables, &BTreeMap::new()))) else {
        return Ok(None);
    };
    let below = Path::new(&path).components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if below { Ok(Some(path)) } else { Err(Error::SubPath { volume: wanted.name.clone(), path }) }
}

/// Opens `path` below `volume` (made as folders where missing), and binds what was opened to `bind`: a container that
/// swaps a folder for a link afterwards gains nothing.
fn bind_below(volume: &Path, path: &str, bind: &Path) -> std::io::Result<PathBuf> {
    let opened = open_below(volume, Path::new(path))?;
    let is_dir = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&opened)?.st_mode).is_dir();
    if fs::symlink_metadata(bind).is_ok() && remove::is_mount_point(bind)? {
        nix::mount::umount2(bind, nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW)?;
    }
    if is_dir {
        fs::create_dir_all(bind)?;
    } else {
        bind.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::OpenOptions::new().create(true).append(true).open(bind)?;
    }
    let source = format!("/proc/self/fd/{}", opened.as_raw_fd());
    mount(Some(source.as_str()), bind, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    Ok(bind.to_owned())
}

fn open_below(volume: &Path, path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(volume, flags | OFlags::DIRECTORY, Mode::empty())?;
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut so_far = PathBuf::new();
    for part in path.components() {
        let parent = if so_far.as_os_str().is_empty() { None } else { Some(so_far.clone()) };
        so_far.push(part);
        let there = rustix::fs::openat2(&root, &so_far, flags, Mode::empty(), stay);
        if there.is_err_and(|e| e == rustix::io::Errno::NOENT) {
            let dir = match parent {
                None => root.try_clone()?,
                Some(parent) => {
                    rustix::fs::openat2(&root, &parent, flags | OFlags::DIRECTORY, Mode::empty(), stay)?
                }
            };
            rustix::fs::mkdirat(&dir, Path::new(part.as_os_str()), Mode::from_raw_mode(0o700))?;
            // By descriptor, which can't be a link to elsewhere: the new folder is as open as its volume.
            let made = rustix::fs::openat2(
                &root,
                &so_far,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                stay,
            )?;
            let of_volume = rustix::fs::fstat(&root)?.st_mode & 0o7777;
            rustix::fs::fchmod(&made, Mode::from_raw_mode(of_volume))?;
        }
    }
    let target = if so_far.as_os_str().is_empty() { PathBuf::from(".") } else { so_far };
    Ok(rustix::fs::openat2(&root, &target, flags, Mode::empty(), stay)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn sub_paths_are_made_but_never_leave_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        fs::create_dir(&volume).unwrap();
        open_below(&volume, Path::new("a/b")).unwrap();
        assert!(volume.join("a/b").is_dir());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&volume.join("a/b")), mode(&volume));
        std::os::unix::fs::symlink("/etc", volume.join("out")).unwrap();
        std::os::unix::fs::symlink("..", volume.join("up")).unwrap();
        std::os::unix::fs::symlink("a", volume.join("inside")).unwrap();
        assert!(open_below(&volume, Path::new("out/passwd")).is_err());
        assert!(open_below(&volume, Path::new("up")).is_err());
        assert!(open_below(&volume, Path::new("inside/b")).is_ok());
    }

    #[test]
    fn climbing_sub_paths_are_refused_and_expressions_expanded() {
        let wanted = |path: &str, expr: &str| VolumeMount {
            name: "v".into(),
            sub_path: Some(path.into()),
            sub_path_expr: Some(expr.into()),
            ..VolumeMount::default()
        };
        let vars = BTreeMap::from([("P".to_owned(), "pod".to_owned()), ("E".to_owned(), "../x".to_owned())]);
        assert_eq!(sub_path(&wanted("", "logs/$(P)"), &vars).unwrap().as_deref(), Some("logs/pod"));
        assert!(sub_path(&wanted("../x", ""), &vars).is_err());
        assert!(sub_path(&wanted("/x", ""), &vars).is_err());
        assert!(sub_path(&wanted("", "a/$(E)"), &vars).is_err());
        assert_eq!(sub_path(&wanted("", ""), &vars).unwrap(), None);
    }
}
