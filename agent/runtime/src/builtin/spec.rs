//! From a pod's wishes and an image's defaults to what an init starts.

use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use weft_agent_runtime_init::cgroup::{Hierarchies, Limits};
use weft_agent_runtime_init::wire;

use super::records::{Paths, SandboxRecord};
use super::security;
use crate::images::{Defaults, Resolved};
use crate::{ContainerSpec, Error, Mount, Propagation, Resources};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Signals that images name; the rest are numbers.
const SIGNALS: [(&str, i32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// Limits as the kernel takes them.
pub(super) fn limits(resources: &Resources) -> Limits {
    Limits {
        cpu_shares: resources.cpu_shares,
        cpu_quota_us: resources.cpu_quota_us,
        cpu_period_us: resources.cpu_period_us,
        memory_bytes: resources.memory_limit_bytes,
        pids: resources.pids_limit,
    }
}

/// The signal that asks a container to stop.
pub(super) fn stop_signal(defaults: &Defaults) -> i32 {
    let named = defaults.stop_signal.as_deref().unwrap_or("");
    let upper = named.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    let known = SIGNALS.iter().find(|(name, _)| *name == short).map(|(_, number)| *number);
    let realtime = short.strip_prefix("RTMIN+").and_then(|n| n.parse::<i32>().ok()).map(|n| 34 + n);
    let number = known.or(realtime).or_else(|| short.parse().ok());
    number.filter(|number| (1..=64).contains(number)).unwrap_or(libc::SIGTERM)
}

/// Everything that a start needs; made once, at creation.
pub(super) struct Context<'a> {
    pub(super) paths: &'a Paths,
    pub(super) hierarchies: &'a Hierarchies,
    pub(super) sandbox: &'a SandboxRecord,
    pub(super) image: &'a Resolved,
    pub(super) layers: PathBuf,
    pub(super) seccomp: Vec<PathBuf>,
}

impl Context<'_> {
    /// What the init is told for a container.
    pub(super) fn start(&self, id: &str, spec: &ContainerSpec) -> Result<wire::Start, Error> {
        let folder = self.paths.container(id);
        let group = self.paths.leaf_cgroup(&self.sandbox.spec, id);
        let pod = &self.sandbox.spec;
        let shm = if pod.host_ipc { PathBuf::from("/dev/shm") } else { self.paths.shm(&self.sandbox.id) };
        Ok(wire::Start {
            id: id.to_owned(),
            process: self.process(spec)?,
            root: wire::Root {
                layers: self.layers.clone(),
                lower: self.image.layers.clone(),
                folder: folder.clone(),
                read_only: spec.security.read_only_root,
            },
            mounts: self.mounts(spec)?,
            privileged: spec.security.privileged,
            host_pid: pod.host_pid,
            shm,
            cgroups: wire::Cgroups {
                join: self.hierarchies.v1(&group),
                unified: self.hierarchies.unified(&group),
                view: self.hierarchies.view(&group),
                oom: self.hierarchies.oom_file(&group),
            },
            log: pod.log_directory.join(inside(&spec.log_path)?),
            tty: spec.tty,
            stdin: spec.stdin,
            state: folder,
            oom_score_adj: spec.resources.oom_score_adj.unwrap_or(0),
        })
    }

    fn process(&self, spec: &ContainerSpec) -> Result<wire::Process, Error> {
        let (image, security) = (&self.image.defaults, &spec.security);
        let mut capabilities = security::capabilities(security)?;
        if !security.privileged && !self.hierarchies.has("devices") {
            // Nothing would hold a device back that the container makes for itself.
            capabilities &= !security::mask_of("MKNOD");
        }
        let cwd = [spec.working_dir.as_str(), image.working_dir.as_deref().unwrap_or("")];
        let cwd = cwd.into_iter().find(|cwd| !cwd.is_empty()).unwrap_or("/");
        Ok(wire::Process {
            argv: argv(spec, image)?,
            env: self.environment(spec),
            cwd: Path::new("/").join(cwd),
            user: wire::User {
                image: image.user.clone().unwrap_or_default(),
                uid: security.run_as_user,
                gid: security.run_as_group,
                supplemental: security.supplemental_groups.clone(),
                non_root: security.run_as_non_root,
            },
            capabilities,
            no_new_privs: security.no_new_privileges,
            seccomp: self.seccomp.clone(),
        })
    }

    /// The image's variables below the container's.
    fn environment(&self, spec: &ContainerSpec) -> Vec<String> {
        let mut all = vec![DEFAULT_PATH.to_owned()];
        if spec.tty {
            all.push("TERM=xterm".to_owned());
        }
        if !self.sandbox.spec.hostname.is_empty() {
            all.push(format!("HOSTNAME={}", self.sandbox.spec.hostname));
        }
        all.extend(self.image.defaults.env.iter().flatten().cloned());
        all.extend(spec.env.iter().map(|(name, value)| format!("{name}={value}")));
        last_of_each_name(all)
    }

    fn mounts(&self, spec: &ContainerSpec) -> Result<Vec<wire::Mount>, Error> {
        let devices = spec.security.privileged;
        let mut mounts = Vec::new();
        let own = spec.mounts.iter().any(|mount| mount.container_path == Path::new(RESOLV_CONF));
        if !own && !self.sandbox.spec.resolv_conf.is_empty() {
            let source = self.paths.sandbox_run(&self.sandbox.id).join("resolv.conf");
            let target = PathBuf::from(RESOLV_CONF);
            let read_only = spec.security.read_only_root;
            mounts.push(wire::Mount {
                source,
                target,
                read_only,
                devices: false,
                propagation: wire::Propagation::Private,
            });
        }
        for mount in &spec.mounts {
            mounts.push(bind(mount, devices)?);
        }
        Ok(mounts)
    }
}

fn bind(mount: &Mount, devices: bool) -> Result<wire::Mount, Error> {
    let invalid = |reason: &str| Error::Invalid {
        what: "mount",
        reason: format!("{}: {reason}", mount.container_path.display()),
    };
    if !mount.container_path.is_absolute() || !mount.host_path.is_absolute() {
        return Err(invalid("paths must be absolute"));
    }
    if mount.container_path.components().any(|part| part == Component::ParentDir) {
        return Err(invalid("path must not hold '..'"));
    }
    Ok(wire::Mount {
        source: mount.host_path.clone(),
        target: mount.container_path.clone(),
        read_only: mount.read_only,
        devices,
        propagation: match mount.propagation {
            Propagation::Private => wire::Propagation::Private,
            Propagation::HostToContainer => wire::Propagation::Slave,
            Propagation::Bidirectional => wire::Propagation::Shared,
        },
    })
}

fn argv(spec: &ContainerSpec, image: &Defaults) -> Result<Vec<String>, Error> {
    let mut argv = if spec.command.is_empty() {
        image.entrypoint.clone().unwrap_or_default()
    } else {
        spec.command.clone()
    };
    if !spec.args.is_empty() {
        argv.extend(spec.args.iter().cloned());
    } else if spec.command.is_empty() {
        argv.extend(image.cmd.iter().flatten().cloned());
    }
    if argv.is_empty() {
        return Err(Error::Start { name: spec.name.clone(), reason: "no command specified".to_owned() });
    }
    Ok(argv)
}

/// Later values of a name replace earlier ones, in the earlier one's place. A pod has variables of every Service of its namespace, which
/// may be thousands.
fn last_of_each_name(all: Vec<String>) -> Vec<String> {
    let mut places: HashMap<String, usize> = HashMap::with_capacity(all.len());
    let mut unique: Vec<String> = Vec::with_capacity(all.len());
    for entry in all {
        let name = entry.split('=').next().unwrap_or_default();
        match places.get(name) {
            Some(&place) => unique[place] = entry,
            None => {
                places.insert(name.to_owned(), unique.len());
                unique.push(entry);
            }
        }
    }
    unique
}

/// A log path that stays in the sandbox's log folder.
fn inside(path: &Path) -> Result<&Path, Error> {
    let fine =
        path.components().all(|part| matches!(part, Component::Normal(_))) && path.file_name().is_some();
    fine.then_some(path).ok_or_else(|| Error::Invalid {
        what: "open a log",
        reason: format!("{} leaves the pod's log folder", path.display()),
    })
}

/// Names that a cgroup path may not hold.
pub(super) fn check_cgroup(path: &str) -> Result<(), Error> {
    let parts: BTreeSet<bool> =
        Path::new(path).components().map(|part| matches!(part, Component::Normal(_))).collect();
    if parts.contains(&false) {
        return Err(Error::Invalid { what: "make a cgroup", reason: format!("bad path {path:?}") });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_and_args_combine_as_kubernetes_says() {
        let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let image = Defaults { entrypoint: Some(own(&["e"])), cmd: Some(own(&["c"])), ..Defaults::default() };
        let with = |command: &[&str], args: &[&str]| {
            argv(
                &ContainerSpec { command: own(command), args: own(args), ..ContainerSpec::default() },
                &image,
            )
            .unwrap()
        };
        assert_eq!(with(&[], &[]), ["e", "c"]);
        assert_eq!(with(&[], &["a"]), ["e", "a"]);
        assert_eq!(with(&["x"], &[]), ["x"]);
        assert_eq!(with(&["x"], &["a"]), ["x", "a"]);
        assert!(argv(&ContainerSpec::default(), &Defaults::default()).is_err());
    }

    #[test]
    fn the_last_of_a_name_stands_where_the_first_was() {
        let own = |entries: &[&str]| entries.iter().map(|entry| (*entry).to_owned()).collect::<Vec<_>>();
        let all = own(&["PATH=/bin", "A=1", "B=x=y", "A=2", "PATH=/usr/bin", "C", "B="]);
        assert_eq!(last_of_each_name(all), ["PATH=/usr/bin", "A=2", "B=", "C"]);
        // Those of ten thousand Services. Comparing each with each would take minutes.
        let many: Vec<String> =
            (0..70_000).map(|number| format!("WEB_{number}_SERVICE_HOST=10.43.0.1")).collect();
        let twice: Vec<String> = many.iter().chain(&many).cloned().collect();
        assert_eq!(last_of_each_name(twice), many);
    }

    #[test]
    fn stop_signals_have_names_and_numbers() {
        let signal =
            |name: &str| stop_signal(&Defaults { stop_signal: Some(name.to_owned()), ..Defaults::default() });
        assert_eq!(
            [signal("SIGQUIT"), signal("quit"), signal("9"), signal("RTMIN+3"), signal("bogus"), signal("")],
            [3, 3, 9, 37, 15, 15]
        );
    }

    #[test]
    fn logs_and_cgroups_stay_in_their_folders() {
        assert!(inside(Path::new("c/0.log")).is_ok());
        for bad in ["../x", "/etc/passwd", "", "a/../../b"] {
            assert!(inside(Path::new(bad)).is_err(), "{bad}");
        }
        assert!(check_cgroup("burstable/pod1").is_ok());
        assert!(check_cgroup("../x").is_err() && check_cgroup("/x").is_err());
    }
}
