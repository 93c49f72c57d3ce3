//! hostPath: something of the node itself, checked against the type that the pod names.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::HostPathVolumeSource;

/// The path, made if the type allows it.
pub(super) fn prepare(source: &HostPathVolumeSource) -> Result<PathBuf, String> {
    let path = PathBuf::from(&source.path);
    if !path.is_absolute() || path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(format!("hostPath {path:?} must be absolute and must not contain '..'"));
    }
    check(&path, source.type_.as_deref().unwrap_or_default())?;
    Ok(path)
}

fn check(path: &Path, type_: &str) -> Result<(), String> {
    let kind = fs::metadata(path).ok().map(|m| m.file_type());
    let shown = path.display();
    let wrong = |what: &str| Err(format!("hostPath type check failed: {shown} is not a {what}"));
    match (type_, kind) {
        // Without a type upstream makes a missing path a folder when the runtime mounts it.
        ("" | "DirectoryOrCreate", None) => {
            fs::create_dir_all(path).map_err(|e| format!("cannot create {shown}: {e}"))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))
                .map_err(|e| format!("cannot chmod {shown}: {e}"))
        }
        ("FileOrCreate", None) => {
            let options = fs::OpenOptions::new().create(true).append(true).open(path);
            options.map(drop).map_err(|e| format!("cannot create {shown}: {e}"))
        }
        ("", Some(_)) => Ok(()),
        ("Directory" | "DirectoryOrCreate", Some(kind)) if kind.is_dir() => Ok(()),
        ("File" | "FileOrCreate", Some(kind)) if kind.is_file() => Ok(()),
        ("Socket", Some(kind)) if kind.is_socket() => Ok(()),
        ("CharDevice", Some(kind)) if kind.is_char_device() => Ok(()),
        ("BlockDevice", Some(kind)) if kind.is_block_device() => Ok(()),
        ("Directory" | "DirectoryOrCreate", _) => wrong("directory"),
        ("File" | "FileOrCreate", _) => wrong("file"),
        ("Socket", _) => wrong("socket file"),
        ("CharDevice", _) => wrong("character device"),
        ("BlockDevice", _) => wrong("block device"),
        (other, _) => Err(format!("{other:?} is an invalid volume type")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_checked_and_made() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str, type_: &str| {
            let path = dir.path().join(name).to_string_lossy().into_owned();
            prepare(&HostPathVolumeSource { path, type_: Some(type_.into()) })
        };
        assert!(at("none", "Directory").unwrap_err().ends_with("is not a directory"));
        assert!(at("made", "DirectoryOrCreate").unwrap().is_dir());
        assert!(at("file", "FileOrCreate").unwrap().is_file());
        assert!(
            at("file", "Directory").is_err() && at("made", "File").is_err() && at("file", "Socket").is_err()
        );
        assert!(prepare(&HostPathVolumeSource { path: "/tmp/../etc".into(), type_: None }).is_err());
    }
}
