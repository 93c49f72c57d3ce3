//! Control groups of v2, hybrid and v1 alike: find the hierarchies, make, limit, join, kill and remove groups.
//!
//! A group is named by a path relative to the root of every hierarchy (`weft/<node>/burstable/pod…/<id>`). The cgroup2
//! tree always gets it too, also where no controller lives there, because eBPF socket hooks key on it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Controllers that containers use; others are left alone.
const WANTED: [&str; 7] = ["cpu", "cpuacct", "memory", "pids", "cpuset", "freezer", "devices"];
/// Controllers handed down in the cgroup2 tree.
const WANTED_V2: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];
/// Passes over a group that still forks while it is being killed.
const KILL_PASSES: usize = 16;

/// Limits to write; `None` leaves the kernel's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU weight on the v1 scale (2 to 262144).
    pub cpu_shares: Option<u64>,
    /// CFS quota in microseconds per period.
    pub cpu_quota_us: Option<i64>,
    /// CFS period in microseconds.
    pub cpu_period_us: Option<u64>,
    /// Memory in bytes.
    pub memory_bytes: Option<i64>,
    /// Tasks.
    pub pids: Option<i64>,
}

/// A limit or controller that the kernel refused; the group works without it.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {value:?} to {path:?}")]
pub struct Refused {
    /// File.
    pub path: PathBuf,
    /// What was written.
    pub value: String,
    /// Why.
    #[source]
    pub source: io::Error,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct V1 {
    name: String,
    controllers: Vec<String>,
    path: PathBuf,
}

/// The hierarchies of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    v1: Vec<V1>,
    unified: Option<PathBuf>,
    /// Controllers that live in the cgroup2 tree.
    v2: Vec<String>,
}

impl Hierarchies {
    /// Finds the mounts below `root` (`/sys/fs/cgroup`).
    ///
    /// # Errors
    /// The mount table can't be read.
    pub fn detect(root: &Path) -> io::Result<Self> {
        let mut found = Self::parse(&fs::read_to_string("/proc/thread-self/mountinfo")?, root);
        if let Some(unified) = &found.unified {
            let controllers = fs::read_to_string(unified.join("cgroup.controllers")).unwrap_or_default();
            found.v2 = controllers.split_whitespace().map(str::to_owned).collect();
        }
        Ok(found)
    }

    fn parse(mountinfo: &str, root: &Path) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((mount, fs)) = line.split_once(" - ") else { continue };
            let mut mount = mount.split(' ').skip(3);
            // A mount of something below the hierarchy's root would make our paths mean something else.
            let (Some("/"), Some(path)) = (mount.next(), mount.next()) else { continue };
            let path = PathBuf::from(path);
            let fs: Vec<&str> = fs.split(' ').collect();
            if !path.starts_with(root) {
                continue;
            }
            match fs.as_slice() {
                ["cgroup2", ..] if found.unified.is_none() => found.unified = Some(path),
                ["cgroup", _, options, ..] => {
                    let controllers: Vec<String> =
                        options.split(',').filter(|o| WANTED.contains(o)).map(str::to_owned).collect();
                    let known = found.v1.iter().any(|v1| v1.controllers == controllers);
                    if !controllers.is_empty() && !known {
                        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
                        found.v1.push(V1 { name: name.unwrap_or_default(), controllers, path });
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Whether there is anything to work with.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.v1.is_empty() && self.unified.is_none()
    }

    /// Whether a controller is there at all.
    #[must_use]
    pub fn has(&self, controller: &str) -> bool {
        self.v1_of(controller).is_some() || self.v2.iter().any(|c| c == controller)
    }

    fn v1_of(&self, controller: &str) -> Option<&V1> {
        self.v1.iter().find(|v1| v1.controllers.iter().any(|c| c == controller))
    }

    fn mounts(&self) -> impl Iterator<Item = &Path> {
        self.v1.iter().map(|v1| v1.path.as_path()).chain(self.unified.as_deref())
    }

    /// The group's folder in the cgroup2 tree.
    #[must_use]
    pub fn unified(&self, group: &Path) -> Option<PathBuf> {
        self.unified.as_ref().map(|root| root.join(group))
    }

    /// The group's folders in the v1 hierarchies.
    #[must_use]
    pub fn v1(&self, group: &Path) -> Vec<PathBuf> {
        self.v1.iter().map(|v1| v1.path.join(group)).collect()
    }

    /// What a container of this group sees below `/sys/fs/cgroup`: name and folder; an empty name is the folder itself.
    #[must_use]
    pub fn view(&self, group: &Path) -> Vec<(String, PathBuf)> {
        if self.v1.is_empty() {
            return self.unified(group).map(|path| (String::new(), path)).into_iter().collect();
        }
        let v1 = self.v1.iter().map(|v1| (v1.name.clone(), v1.path.join(group)));
        v1.chain(self.unified(group).map(|path| ("unified".to_owned(), path))).collect()
    }

    /// The file that counts the group's OOM kills.
    #[must_use]
    pub fn oom_file(&self, group: &Path) -> Option<PathBuf> {
        if let Some(v1) = self.v1_of("memory") {
            return Some(v1.path.join(group).join("memory.oom_control"));
        }
        self.has("memory").then(|| self.unified(group)).flatten().map(|path| path.join("memory.events"))
    }

    /// Makes a group with its ancestors in every hierarchy. What a controller refuses is returned.
    ///
    /// # Errors
    /// A folder can't be made.
    pub fn create(&self, group: &Path) -> io::Result<Vec<Refused>> {
        let mut refused = Vec::new();
        for v1 in &self.v1 {
            let cpuset = v1.controllers.iter().any(|c| c == "cpuset");
            if !cpuset {
                make(&v1.path.join(group))?;
                continue;
            }
            let mut path = v1.path.clone();
            for part in group {
                let parent = path.clone();
                path.push(part);
                make(&path)?;
                refused.extend(inherit_cpuset(&parent, &path));
            }
        }
        if let Some(root) = &self.unified {
            let mut path = root.clone();
            for part in group {
                for controller in WANTED_V2.iter().filter(|c| self.v2.iter().any(|have| have == *c)) {
                    refused
                        .extend(write(&path.join("cgroup.subtree_control"), format!("+{controller}")).err());
                }
                path.push(part);
                make(&path)?;
            }
        }
        Ok(refused)
    }

    /// Writes limits; returns those that the kernel refused.
    #[must_use]
    pub fn limit(&self, group: &Path, limits: &Limits) -> Vec<Refused> {
        let mut writes = Vec::new();
        for (controller, file, value) in limits.v1() {
            if let Some(v1) = self.v1_of(controller) {
                writes.push((v1.path.join(group).join(file), value));
            }
        }
        for (controller, file, value) in limits.v2() {
            if let Some(root) = self.unified.as_ref().filter(|_| self.v2.iter().any(|c| c == controller)) {
                writes.push((root.join(group).join(file), value));
            }
        }
        writes.into_iter().filter_map(|(path, value)| write(&path, value).err()).collect()
    }

    /// Lets a group use no devices but the standard ones. False where there is no v1 device controller.
    ///
    /// # Errors
    /// The kernel refused a rule.
    pub fn restrict_devices(&self, group: &Path) -> Result<bool, Refused> {
        let Some(v1) = self.v1_of("devices") else { return Ok(false) };
        let folder = v1.path.join(group);
        write(&folder.join("devices.deny"), "a".to_owned())?;
        for rule in DEVICES {
            write(&folder.join("devices.allow"), rule.to_owned())?;
        }
        Ok(true)
    }

    /// Kills every process of a group and below.
    pub fn kill(&self, group: &Path) {
        if let Some(unified) = self.unified(group) {
            // Since Linux 5.14; the passes below serve older ones.
            let _ = fs::write(unified.join("cgroup.kill"), "1");
        }
        for mount in self.mounts() {
            kill_tree(&mount.join(group));
        }
    }

    /// Whether a process is left in a group or below.
    #[must_use]
    pub fn populated(&self, group: &Path) -> bool {
        self.mounts().any(|mount| !pids(&mount.join(group)).is_empty())
    }

    /// Removes a group and all below it from every hierarchy; false while the kernel still holds a part.
    #[must_use]
    pub fn remove(&self, group: &Path) -> bool {
        self.mounts().filter(|mount| !remove_tree(&mount.join(group))).count() == 0
    }

    /// Removes a group if nothing is in or below it.
    pub fn remove_if_empty(&self, group: &Path) {
        for mount in self.mounts() {
            let _ = fs::remove_dir(mount.join(group));
        }
    }

    /// All groups at or below one, in any hierarchy, relative to the root; the deepest first.
    #[must_use]
    pub fn groups_below(&self, group: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for mount in self.mounts() {
            let mut pending = vec![mount.join(group)];
            while let Some(folder) = pending.pop() {
                pending.extend(subfolders(&folder));
                if let Ok(relative) = folder.strip_prefix(mount) {
                    found.push(relative.to_path_buf());
                }
            }
        }
        found.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        found.dedup();
        found
    }
}

/// The devices of every container: null, zero, full, random, urandom, tty, console, ptmx and the terminals.
/// Making nodes is no use of a device, so `mknod` stays allowed.
const DEVICES: [&str; 11] = [
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:1 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
];

impl Limits {
    fn v1(&self) -> Vec<(&'static str, &'static str, String)> {
        let mut writes = Vec::new();
        let mut add = |controller, file, value: Option<String>| {
            writes.extend(value.map(|value| (controller, file, value)));
        };
        add("cpu", "cpu.shares", self.cpu_shares.map(|v| v.to_string()));
        add("cpu", "cpu.cfs_period_us", self.cpu_period_us.map(|v| v.to_string()));
        add("cpu", "cpu.cfs_quota_us", self.cpu_quota_us.map(|v| v.to_string()));
        add("memory", "memory.limit_in_bytes", self.memory_bytes.map(|v| v.to_string()));
        add("pids", "pids.max", self.pids.map(or_max));
        writes
    }

    fn v2(&self) -> Vec<(&'static str, &'static str, String)> {
        let mut writes = Vec::new();
        if let Some(shares) = self.cpu_shares {
            // KEP-2254's mapping of [2, 262144] to [1, 10000].
            let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142;
            writes.push(("cpu", "cpu.weight", weight.to_string()));
        }
        if self.cpu_quota_us.is_some() || self.cpu_period_us.is_some() {
            let period = self.cpu_period_us.unwrap_or(100_000);
            writes.push(("cpu", "cpu.max", format!("{} {period}", or_max(self.cpu_quota_us.unwrap_or(-1)))));
        }
        if let Some(bytes) = self.memory_bytes {
            writes.push(("memory", "memory.max", or_max(bytes)));
        }
        if let Some(pids) = self.pids {
            writes.push(("pids", "pids.max", or_max(pids)));
        }
        writes
    }
}

fn or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn make(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

fn write(path: &Path, value: String) -> Result<(), Refused> {
    fs::write(path, &value).map_err(|source| Refused { path: path.to_path_buf(), value, source })
}

/// A v1 cpuset without cpus or memory nodes takes no task.
fn inherit_cpuset(parent: &Path, child: &Path) -> Vec<Refused> {
    let mut refused = Vec::new();
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let set = |folder: &Path| fs::read_to_string(folder.join(file)).unwrap_or_default();
        if set(child).trim().is_empty() {
            refused.extend(write(&child.join(file), set(parent).trim().to_owned()).err());
        }
    }
    refused
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
    folders.map(|entry| entry.path()).collect()
}

fn pids(folder: &Path) -> Vec<i32> {
    let mut found: Vec<i32> = fs::read_to_string(folder.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 0)
        .collect();
    for below in subfolders(folder) {
        found.extend(pids(&below));
    }
    found
}

fn kill_tree(folder: &Path) {
    for _ in 0..KILL_PASSES {
        let left = pids(folder);
        if left.is_empty() {
            return;
        }
        // A v1 freezer holds the group still between reading and killing; elsewhere the file isn't there.
        let freezer = folder.join("freezer.state");
        let frozen = freezer.exists() && fs::write(&freezer, "FROZEN").is_ok();
        for pid in left {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        if frozen {
            let _ = fs::write(&freezer, "THAWED");
        }
    }
}

fn remove_tree(folder: &Path) -> bool {
    for below in subfolders(folder) {
        if !remove_tree(&below) {
            return false;
        }
    }
    match fs::remove_dir(folder) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Puts the calling process, of one thread, into groups of version 1 by their folders; returns those that refused.
///
/// A thread that moves itself is all that the kernel moves without a lock on every fork of the machine, for which it waits a grace period, 10 ms
/// and more for each group.
#[must_use]
pub fn join(folders: &[PathBuf]) -> Vec<Refused> {
    folders.iter().filter_map(|folder| write(&folder.join("tasks"), "0".to_owned()).err()).collect()
}

/// The number after `oom_kill` in a file as named by [`Hierarchies::oom_file`].
#[must_use]
pub fn oom_kills(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 28 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
35 30 0:28 / /mnt/memory rw - cgroup cgroup rw,memory
36 30 0:31 /docker/x /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids";

    #[test]
    fn hybrid_hierarchies_are_told_apart() {
        let found = Hierarchies::parse(HYBRID, Path::new("/sys/fs/cgroup"));
        let names: Vec<&str> = found.v1.iter().map(|v1| v1.name.as_str()).collect();
        assert_eq!(names, ["cpu,cpuacct", "memory"]);
        assert_eq!(found.unified(Path::new("weft/a")), Some("/sys/fs/cgroup/unified/weft/a".into()));
        assert!(found.has("cpuacct") && !found.has("pids"));
        assert_eq!(found.view(Path::new("w")).len(), 3);
    }

    #[test]
    fn a_pure_v2_machine_shows_the_group_itself() {
        let found = Hierarchies::parse(
            "31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
            Path::new("/sys/fs/cgroup"),
        );
        assert_eq!(found.view(Path::new("w")), [(String::new(), PathBuf::from("/sys/fs/cgroup/w"))]);
    }

    #[test]
    fn limits_are_said_in_both_dialects() {
        let limits = Limits {
            cpu_shares: Some(1024),
            cpu_quota_us: Some(50_000),
            cpu_period_us: Some(100_000),
            memory_bytes: Some(1 << 20),
            pids: Some(-1),
        };
        let v2: Vec<String> =
            limits.v2().into_iter().map(|(_, file, value)| format!("{file}={value}")).collect();
        assert_eq!(v2, ["cpu.weight=39", "cpu.max=50000 100000", "memory.max=1048576", "pids.max=max"]);
        let v1: Vec<String> =
            limits.v1().into_iter().map(|(_, file, value)| format!("{file}={value}")).collect();
        assert_eq!(v1[0], "cpu.shares=1024");
        assert_eq!(v1[3], "memory.limit_in_bytes=1048576");
    }
}
