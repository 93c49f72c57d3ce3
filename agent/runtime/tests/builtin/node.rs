//! A node's runtime in folders and a cgroup of its own, and what a test asks of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::json;
use weft_agent_runtime::builtin::{BuiltinRuntime, Config, purge};
use weft_agent_runtime::{ContainerSpec, ContainerState, Exit, Runtime, SandboxSpec, Stdio};

use crate::image;

/// A bound against waiting for ever: an emulated machine takes its time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The weft-init under test: `WEFT_INIT`, or the one that cargo builds beside this test.
pub(crate) fn init_path() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("WEFT_INIT") {
            return PathBuf::from(path);
        }
        let exe = std::env::current_exe().unwrap();
        let path = exe.ancestors().nth(2).unwrap().join("weft-init");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("init/src");
        let modified = |path: &Path| {
            fs::metadata(path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let newest =
            fs::read_dir(sources).unwrap().map(|entry| modified(&entry.unwrap().path())).max().unwrap();
        if modified(&path) < newest {
            let built = Command::new(env!("CARGO"))
                .args(["build", "--package", "weft-agent-runtime-init"])
                .status()
                .unwrap();
            assert!(built.success(), "weft-init does not build");
        }
        path
    })
    .clone()
}

pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) runtime: Option<BuiltinRuntime>,
    pub(crate) folder: tempfile::TempDir,
}

impl Node {
    /// A node with busybox imported and a network plugin that only says where the pod is.
    pub(crate) async fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::tempdir().unwrap();
        let config = Self::at(&name, folder.path());
        fs::create_dir_all(&config.cni_conf_dir).unwrap();
        fs::create_dir_all(&config.cni_bin_dirs[0]).unwrap();
        let mut node = Self { config, runtime: None, folder };
        node.plugin(NOOP_PLUGIN);
        node.network(&json!({"cniVersion": "1.1.0", "name": "t", "plugins": [{"type": "noop"}]}));
        node.runtime = Some(BuiltinRuntime::open(node.config.clone()).await.unwrap());
        let archive = image::busybox("busybox:1", json!({"Env": ["FROM=image", "KEEP=1"], "Cmd": ["sh"]}))
            .write(node.folder.path());
        node.runtime().images().import(&archive).unwrap();
        node
    }

    /// The configuration of a node in a test's folder.
    pub(crate) fn at(name: &str, folder: &Path) -> Config {
        let mut config = Config::new(name, &folder.join("data"), &folder.join("run"));
        config.init_path = init_path();
        config.cni_bin_dirs = vec![folder.join("plugins")];
        config.cni_conf_dir = folder.join("conf");
        config
    }

    pub(crate) fn runtime(&self) -> &BuiltinRuntime {
        self.runtime.as_ref().unwrap()
    }

    pub(crate) fn plugin(&self, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.config.cni_bin_dirs[0].join("noop");
        fs::write(&path, script.replace("@LOG@", &self.plugin_log().display().to_string())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub(crate) fn network(&self, config: &serde_json::Value) {
        fs::write(self.config.cni_conf_dir.join("10-test.conflist"), config.to_string()).unwrap();
    }

    pub(crate) fn plugin_log(&self) -> PathBuf {
        self.folder.path().join("plugin.log")
    }

    /// As if the agent were killed: nothing is told to anybody.
    pub(crate) async fn restart(&mut self) {
        self.runtime = None;
        self.runtime = Some(BuiltinRuntime::open(self.config.clone()).await.unwrap());
    }

    pub(crate) fn pod(&self) -> SandboxSpec {
        pod(self.folder.path())
    }

    pub(crate) async fn sandbox(&self) -> String {
        self.runtime().run_sandbox(self.pod()).await.unwrap().id
    }

    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join("logs").join(name).join("0.log")).unwrap_or_default()
    }

    /// The log without times and tags.
    pub(crate) fn output(&self, name: &str) -> String {
        let log = self.log(name);
        log.lines().filter_map(|line| Some(format!("{}\n", line.splitn(4, ' ').nth(3)?))).collect()
    }

    pub(crate) async fn start(&self, sandbox: &str, spec: ContainerSpec) -> String {
        let id = self.runtime().create_container(sandbox, spec).await.unwrap();
        self.runtime().start_container(&id).await.unwrap();
        id
    }

    pub(crate) async fn exit(&self, id: &str) -> Exit {
        let mut events = self.runtime().events();
        let wait = async {
            loop {
                if let ContainerState::Exited(exit) = self.runtime().container(id).await.unwrap().state {
                    return exit;
                }
                events.recv().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("the container does not end")
    }

    /// Runs a script to its end in a new sandbox.
    pub(crate) async fn run(&self, spec: ContainerSpec) -> (Exit, String) {
        let sandbox = self.sandbox().await;
        let name = spec.name.clone();
        let id = self.start(&sandbox, spec).await;
        let exit = self.exit(&id).await;
        (exit, self.output(&name))
    }

    /// Runs a command in a container; its code and output.
    pub(crate) async fn exec(&self, id: &str, command: &[&str]) -> (i32, String) {
        let (read, write) = std::io::pipe().unwrap();
        let stdio = Stdio {
            stdout: Some(write.try_clone().unwrap().into()),
            stderr: Some(write.into()),
            ..Stdio::default()
        };
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let code = self.runtime().exec(id, command, stdio).await.unwrap();
        let output =
            tokio::task::spawn_blocking(move || std::io::read_to_string(read).unwrap()).await.unwrap();
        (code, output)
    }

    /// Command lines of the inits of this node that run.
    pub(crate) fn inits(&self) -> Vec<String> {
        let ours = self.folder.path().to_string_lossy().into_owned();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .map(|process| fs::read(process.path().join("cmdline")).unwrap_or_default())
            .map(|command| String::from_utf8_lossy(&command).into_owned())
            .filter(|command| command.starts_with("weft-init") && command.contains(&ours))
            .collect()
    }

    /// Ends all and checks that nothing is left.
    pub(crate) async fn finish(mut self) {
        self.runtime = None;
        purge(self.config.clone()).await.unwrap();
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let ours = self.folder.path().to_string_lossy().into_owned();
        let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&ours)).collect();
        assert!(left.is_empty(), "mounts are left: {left:?}");
        for hierarchy in fs::read_dir(&self.config.cgroup_root).unwrap().flatten() {
            let group = hierarchy.path().join(&self.config.cgroup_parent);
            assert!(!group.exists(), "a cgroup is left: {}", group.display());
        }
        assert_eq!(self.inits(), [""; 0], "processes are left");
        assert!(!self.config.run_dir.join(&self.config.node_name).exists(), "run-time files are left");
    }
}

impl Drop for Node {
    /// A failed test must not leave what the next would find.
    fn drop(&mut self) {
        if self.runtime.take().is_none() {
            return;
        }
        let config = self.config.clone();
        let clean = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(purge(config))
        });
        if let Ok(Err(error)) = clean.join() {
            eprintln!("cannot clean up: {error}");
        }
    }
}

pub(crate) fn pod(folder: &Path) -> SandboxSpec {
    SandboxSpec {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        uid: "uid-1".to_owned(),
        hostname: "podhost".to_owned(),
        resolv_conf: "nameserver 10.43.0.10\n".to_owned(),
        log_directory: folder.join("logs"),
        cgroup: "burstable/poduid-1".to_owned(),
        ..SandboxSpec::default()
    }
}

/// A container that runs a shell script.
pub(crate) fn script(name: &str, text: &str) -> ContainerSpec {
    ContainerSpec {
        name: name.to_owned(),
        image: "busybox:1".to_owned(),
        command: vec!["sh".to_owned(), "-c".to_owned(), text.to_owned()],
        log_path: PathBuf::from(name).join("0.log"),
        ..ContainerSpec::default()
    }
}

pub(crate) const NOOP_PLUGIN: &str = r#"#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS $CNI_ARGS $(cat)" >> @LOG@
if [ "$CNI_COMMAND" = ADD ]; then
    echo '{"cniVersion":"1.1.0","ips":[{"address":"10.42.0.7/24"}]}'
fi
"#;
