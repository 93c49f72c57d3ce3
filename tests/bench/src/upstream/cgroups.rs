//! The cgroup below which upstream's kubelet puts its pods, in every hierarchy of the machine.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use weft_tests_harness::wait_until;

const ROOT: &str = "/sys/fs/cgroup";
/// Processes that were ended leave their cgroup a moment later.
const PATIENCE: Duration = Duration::from_secs(20);
/// A new cgroup of version 1 has neither processors nor memory, and takes no process until it has.
const INHERITED: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// One folder in each hierarchy.
pub(super) struct Cgroups {
    name: String,
    folders: Vec<PathBuf>,
}

impl Cgroups {
    /// Makes them.
    pub(super) fn new(name: &str) -> anyhow::Result<Self> {
        let mut cgroups = Self { name: name.to_owned(), folders: Vec::new() };
        for hierarchy in hierarchies()? {
            let folder = hierarchy.join(name);
            fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
            cgroups.folders.push(folder.clone());
            for file in INHERITED.iter().filter(|file| folder.join(file).is_file()) {
                let value = fs::read_to_string(hierarchy.join(file))?;
                // The root of version 2 has no such file, and its children need none.
                fs::write(folder.join(file), value)
                    .with_context(|| format!("fill {file} of {}", folder.display()))?;
            }
        }
        Ok(cgroups)
    }

    /// Their path within each hierarchy.
    pub(super) fn path(&self) -> String {
        format!("/{}", self.name)
    }

    /// Removes them with all below them.
    pub(super) fn remove(&mut self) -> anyhow::Result<()> {
        while let Some(folder) = self.folders.last() {
            wait_until("a cgroup is removed", PATIENCE, || remove(folder).map(Some))?;
            self.folders.pop();
        }
        Ok(())
    }
}

/// The mounted ones: those of version 1 and, where it is beside them or alone, version 2's.
fn hierarchies() -> anyhow::Result<Vec<PathBuf>> {
    if Path::new(ROOT).join("cgroup.procs").exists() {
        return Ok(vec![PathBuf::from(ROOT)]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(ROOT).with_context(|| format!("read {ROOT}"))? {
        let entry = entry?;
        // Names that several controllers share are links to one folder.
        if entry.file_type()?.is_dir() && entry.path().join("cgroup.procs").exists() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// A cgroup can be removed once those below it are; its files go with it.
fn remove(folder: &Path) -> anyhow::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("read {}", folder.display())),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(folder).with_context(|| format!("remove {}", folder.display()))
}
