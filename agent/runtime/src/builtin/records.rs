//! What the built-in runtime keeps on disk, and where.
//!
//! ```text
//! <data-dir>/nodes/<node>/images/                    the image store
//! <data-dir>/nodes/<node>/sandboxes/<id>/record.json, network.json
//! <data-dir>/nodes/<node>/containers/<id>/record.json, upper/, work/, root/, run.json, exit.json
//! <run-dir>/<node>/sandboxes/<id>/config.json, init.sock, init.log, resolv.conf, shm/
//! <run-dir>/<node>/netns/<sandbox id>                the pinned network namespace
//! <run-dir>/<node>/seccomp/
//! ```
//!
//! A record is written before what it records is made, so whatever a crash leaves has an owner. Nothing is synced: after
//! a crash of the machine nothing runs, and a record that is lost or torn is debris like the rest.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use weft_agent_runtime_init::wire;

use crate::{ContainerSpec, Error, SandboxSpec};

const RECORD: &str = "record.json";
const NETWORK: &str = "network.json";

/// How far a sandbox has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// Found after a crash, it is undone.
    Creating,
    Ready,
    /// Its init is to end or has ended; it never comes back.
    Stopped,
}

/// A sandbox on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SandboxRecord {
    pub(super) id: String,
    pub(super) spec: SandboxSpec,
    pub(super) phase: Phase,
    pub(super) ips: Vec<IpAddr>,
    pub(super) created_at_ns: i64,
}

/// A container on disk, with all that is needed to start it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ContainerRecord {
    pub(super) id: String,
    pub(super) sandbox_id: String,
    pub(super) spec: ContainerSpec,
    pub(super) image_id: String,
    pub(super) created_at_ns: i64,
    pub(super) stop_signal: i32,
    pub(super) start: wire::Start,
}

/// Where things are.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    pub(super) data: PathBuf,
    pub(super) run: PathBuf,
    /// The node's root cgroup, relative to each hierarchy.
    pub(super) cgroup: PathBuf,
}

impl Paths {
    pub(super) fn sandboxes(&self) -> PathBuf {
        self.data.join("sandboxes")
    }

    pub(super) fn sandbox(&self, id: &str) -> PathBuf {
        self.sandboxes().join(id)
    }

    pub(super) fn containers(&self) -> PathBuf {
        self.data.join("containers")
    }

    pub(super) fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }

    pub(super) fn sandbox_run(&self, id: &str) -> PathBuf {
        self.run.join("sandboxes").join(id)
    }

    pub(super) fn shm(&self, id: &str) -> PathBuf {
        self.sandbox_run(id).join("shm")
    }

    pub(super) fn netns(&self, id: &str) -> PathBuf {
        self.run.join("netns").join(id)
    }

    pub(super) fn seccomp(&self) -> PathBuf {
        self.run.join("seccomp")
    }

    pub(super) fn network(&self, id: &str) -> PathBuf {
        self.sandbox(id).join(NETWORK)
    }

    pub(super) fn pod_cgroup(&self, spec: &SandboxSpec) -> PathBuf {
        self.cgroup.join(&spec.cgroup)
    }

    /// The group of a container, or of a sandbox's init.
    pub(super) fn leaf_cgroup(&self, spec: &SandboxSpec, id: &str) -> PathBuf {
        self.pod_cgroup(spec).join(id)
    }

    pub(super) fn save_sandbox(&self, record: &SandboxRecord) -> Result<(), Error> {
        save(&self.sandbox(&record.id).join(RECORD), record)
    }

    pub(super) fn save_container(&self, record: &ContainerRecord) -> Result<(), Error> {
        save(&self.container(&record.id).join(RECORD), record)
    }

    /// Every sandbox; folders without a whole record are named apart.
    pub(super) fn load_sandboxes(&self) -> Result<(Vec<SandboxRecord>, Vec<String>), Error> {
        load_all(&self.sandboxes())
    }

    /// Every container; folders without a whole record are named apart.
    pub(super) fn load_containers(&self) -> Result<(Vec<ContainerRecord>, Vec<String>), Error> {
        load_all(&self.containers())
    }
}

fn load_all<T: DeserializeOwned>(folder: &Path) -> Result<(Vec<T>, Vec<String>), Error> {
    let (mut records, mut debris) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(io_error("read", folder))? {
        let entry = entry.map_err(io_error("read", folder))?;
        match load(&entry.path().join(RECORD))? {
            Some(record) => records.push(record),
            None => debris.push(entry.file_name().to_string_lossy().into_owned()),
        }
    }
    Ok((records, debris))
}

/// A file of JSON; `None` if it isn't there or isn't whole.
pub(super) fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// Written aside and renamed, so that a reader sees all or nothing.
pub(super) fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let aside = path.with_extension("new");
    let text = serde_json::to_vec(value).map_err(|error| io_error("write", &aside)(error.into()))?;
    fs::write(&aside, text).map_err(io_error("write", &aside))?;
    fs::rename(&aside, path).map_err(io_error("write", path))
}

pub(super) fn make_folder(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(io_error("make", path))
}

/// Removes a folder with all in it, or a file; nothing there is fine.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn io_error(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { op, path, source }
}
