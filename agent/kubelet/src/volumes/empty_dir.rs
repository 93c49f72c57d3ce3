//! emptyDir: a folder that lives as long as its pod, on disk or in memory.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use k8s_openapi::api::core::v1::EmptyDirVolumeSource;
use nix::mount::{MsFlags, mount};

use crate::quantity::value_of;

/// Makes the folder; one that is there already keeps its content.
pub(super) fn prepare(dir: &Path, source: &EmptyDirVolumeSource) -> io::Result<()> {
    if !dir.is_dir() {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777))?;
    }
    match source.medium.as_deref().unwrap_or_default() {
        "" => Ok(()),
        "Memory" if super::remove::is_mount_point(dir)? => Ok(()),
        "Memory" => {
            let limit = source.size_limit.as_ref().map(value_of).filter(|bytes| *bytes > 0);
            let options =
                limit.map_or_else(|| "mode=0777".to_owned(), |bytes| format!("mode=0777,size={bytes}"));
            mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?;
            Ok(())
        }
        other => Err(io::Error::other(format!("unknown storage medium {other:?}"))),
    }
}
