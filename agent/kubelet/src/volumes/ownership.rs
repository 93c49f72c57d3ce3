//! fsGroup: gives a volume's content to a group, never following links.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

use crate::pod;

/// The pod's fsGroup.
pub(super) fn fs_group(pod: &Pod) -> Option<u32> {
    let context = pod::spec(pod).security_context.as_ref()?;
    u32::try_from(context.fs_group?).ok()
}

/// Applies the pod's fsGroup to everything below `dir`.
pub(super) fn apply(dir: &Path, pod: &Pod) -> io::Result<()> {
    let Some(group) = fs_group(pod) else { return Ok(()) };
    let policy = pod::spec(pod).security_context.as_ref().and_then(|c| c.fs_group_change_policy.as_deref());
    let root = fs::symlink_metadata(dir)?;
    if policy == Some("OnRootMismatch") && root.gid() == group && root.mode() & 0o2060 == 0o2060 {
        return Ok(());
    }
    change(dir, group)
}

fn change(path: &Path, group: u32) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    lchown(path, None, Some(group))?;
    if meta.is_symlink() {
        return Ok(());
    }
    // Group may do what is needed to use it; new entries of a folder inherit the group.
    let more = if meta.is_dir() { 0o2070 } else { 0o060 };
    fs::set_permissions(path, fs::Permissions::from_mode(meta.mode() & 0o7777 | more))?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            change(&entry?.path(), group)?;
        }
    }
    Ok(())
}
