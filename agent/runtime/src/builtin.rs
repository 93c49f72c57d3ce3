//! The built-in runtime: one `weft-init` per sandbox, records on disk, and this view of them in memory.
//!
//! The agent may be killed between any two steps. Records are written before what they record is made; [`open`] finds
//! every sandbox and container again, undoes what is half made and removes what has no record.
//!
//! [`open`]: BuiltinRuntime::open

mod container;
mod init;
mod records;
mod recover;
mod sandbox;
mod seccomp;
mod security;
mod spec;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use weft_agent_runtime_init::cgroup::{Hierarchies, Refused};

use self::records::{ContainerRecord, Paths, Phase, SandboxRecord};
use crate::chain;
use crate::cni::Network;
use crate::folders;
use crate::images::{ImageError, ImageStore};
use crate::{
    Container, ContainerSpec, ContainerState, Error, Image, Runtime, RuntimeEvent, Sandbox, SandboxSpec,
    Stdio,
};

/// Events that a slow reader may fall behind.
const EVENTS: usize = 1024;

/// Where a node's runtime lives.
#[derive(Clone, Debug)]
pub struct Config {
    /// Node's name.
    pub node_name: String,
    /// `/var/lib/weft`; the node's own folder is `nodes/<node>` in it.
    pub data_dir: PathBuf,
    /// `/run/weft`; the node's own folder is `<node>` in it.
    pub run_dir: PathBuf,
    /// The program `weft-init`.
    pub init_path: PathBuf,
    /// Folders with CNI plugins.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Folder with CNI configurations.
    pub cni_conf_dir: PathBuf,
    /// Where control groups are mounted: `/sys/fs/cgroup`.
    pub cgroup_root: PathBuf,
    /// The node's root group in every hierarchy: `weft/<node>`.
    pub cgroup_parent: PathBuf,
}

impl Config {
    /// The usual places of a node.
    #[must_use]
    pub fn new(node_name: &str, data_dir: &Path, run_dir: &Path) -> Self {
        Self {
            node_name: node_name.to_owned(),
            data_dir: data_dir.to_path_buf(),
            run_dir: run_dir.to_path_buf(),
            init_path: data_dir.join("bin/weft-init"),
            cni_bin_dirs: vec![
                data_dir.join("bin"),
                PathBuf::from("/opt/cni/bin"),
                PathBuf::from("/usr/lib/cni"),
            ],
            cni_conf_dir: run_dir.join(node_name).join("cni"),
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            cgroup_parent: Path::new("weft").join(node_name),
        }
    }

    /// The node's image store.
    #[must_use]
    pub fn image_dir(&self) -> PathBuf {
        self.data_dir.join("nodes").join(&self.node_name).join("images")
    }

    fn paths(&self) -> Paths {
        Paths {
            data: self.data_dir.join("nodes").join(&self.node_name),
            run: self.run_dir.join(&self.node_name),
            cgroup: self.cgroup_parent.clone(),
        }
    }

    fn check(&self) -> Result<(), Error> {
        let name = &self.node_name;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(Error::Invalid {
                what: "open the runtime",
                reason: format!("bad node name {name:?}"),
            });
        }
        let relative = [&self.cgroup_parent].into_iter().all(|path| path.is_relative());
        let absolute =
            [&self.data_dir, &self.run_dir, &self.init_path].into_iter().all(|path| path.is_absolute());
        if !relative || !absolute {
            return Err(Error::Invalid {
                what: "open the runtime",
                reason: "folders must be absolute, the cgroup relative".into(),
            });
        }
        Ok(())
    }
}

struct SandboxEntry {
    record: SandboxRecord,
    alive: bool,
    pid: i32,
}

struct ContainerEntry {
    record: Arc<ContainerRecord>,
    state: watch::Sender<ContainerState>,
}

#[derive(Default)]
struct State {
    sandboxes: BTreeMap<String, SandboxEntry>,
    containers: BTreeMap<String, ContainerEntry>,
}

struct Inner {
    init_path: PathBuf,
    paths: Paths,
    hierarchies: Hierarchies,
    images: ImageStore,
    network: Network,
    state: Mutex<State>,
    events: broadcast::Sender<RuntimeEvent>,
    cancel: CancellationToken,
    /// Limits and controllers that the kernel refused and that were warned about.
    warned: Mutex<std::collections::BTreeSet<String>>,
}

/// The runtime of a node.
pub struct BuiltinRuntime {
    inner: Arc<Inner>,
    /// Ends the listeners with the runtime; the inits and their containers go on.
    _cancel: DropGuard,
}

impl BuiltinRuntime {
    /// Opens the node's runtime and adopts what runs.
    ///
    /// # Errors
    /// A folder can't be used or a record can't be read.
    pub async fn open(config: Config) -> Result<Self, Error> {
        config.check()?;
        let cancel = CancellationToken::new();
        let guard = cancel.clone().drop_guard();
        let inner = blocking(move || Inner::new(config, cancel)).await?;
        let inner = Arc::new(inner);
        inner.recover().await?;
        Ok(Self { inner, _cancel: guard })
    }

    /// The node's images, for import and removal.
    #[must_use]
    pub fn images(&self) -> &ImageStore {
        &self.inner.images
    }

    /// Whether the network can take pods: a configuration is there, and its plugins say so (CNI STATUS).
    ///
    /// # Errors
    /// What is missing.
    pub async fn network_status(&self) -> Result<(), Error> {
        self.inner.network.status().await.map_err(network_error)
    }

    /// CNI CHECK of a sandbox.
    ///
    /// # Errors
    /// A plugin found its network broken.
    pub async fn check_network(&self, sandbox_id: &str) -> Result<(), Error> {
        self.inner.check_network(sandbox_id).await
    }

    /// Runs an operation to its end even if the caller goes away: half an operation would wait for the next start.
    async fn whole<T, F>(&self, operation: impl FnOnce(Arc<Inner>) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        joined(tokio::spawn(operation(self.inner.clone())).await)
    }
}

/// Ends everything of a node: sandboxes, containers, networks, mounts, cgroups, records. Images stay; they are files.
///
/// # Errors
/// The first that could not be removed; all else has been tried.
pub async fn purge(config: Config) -> Result<(), Error> {
    let runtime = BuiltinRuntime::open(config).await?;
    runtime.inner.purge().await
}

#[async_trait::async_trait]
impl Runtime for BuiltinRuntime {
    async fn run_sandbox(&self, spec: SandboxSpec) -> Result<Sandbox, Error> {
        self.whole(|inner| async move { inner.run_sandbox(spec).await }).await
    }

    async fn stop_sandbox(&self, sandbox_id: &str) -> Result<(), Error> {
        let id = sandbox_id.to_owned();
        self.whole(|inner| async move { inner.stop_sandbox(&id).await }).await
    }

    async fn remove_sandbox(&self, sandbox_id: &str) -> Result<(), Error> {
        let id = sandbox_id.to_owned();
        self.whole(|inner| async move { inner.remove_sandbox(&id).await }).await
    }

    async fn list_sandboxes(&self) -> Result<Vec<Sandbox>, Error> {
        Ok(self.inner.state.lock().sandboxes.values().map(SandboxEntry::as_found).collect())
    }

    async fn create_container(&self, sandbox_id: &str, spec: ContainerSpec) -> Result<String, Error> {
        let id = sandbox_id.to_owned();
        self.whole(|inner| async move { inner.create_container(&id, spec).await }).await
    }

    async fn start_container(&self, container_id: &str) -> Result<(), Error> {
        let id = container_id.to_owned();
        self.whole(|inner| async move { inner.start_container(&id).await }).await
    }

    async fn stop_container(&self, container_id: &str, grace: Duration) -> Result<(), Error> {
        self.inner.stop_container(container_id, grace).await
    }

    async fn remove_container(&self, container_id: &str) -> Result<(), Error> {
        let id = container_id.to_owned();
        self.whole(|inner| async move { inner.remove_container(&id).await }).await
    }

    async fn list_containers(&self) -> Result<Vec<Container>, Error> {
        Ok(self.inner.state.lock().containers.values().map(ContainerEntry::as_found).collect())
    }

    async fn container(&self, container_id: &str) -> Result<Container, Error> {
        let state = self.inner.state.lock();
        state
            .containers
            .get(container_id)
            .map(ContainerEntry::as_found)
            .ok_or_else(|| not_found("container", container_id))
    }

    async fn exec(&self, container_id: &str, command: Vec<String>, stdio: Stdio) -> Result<i32, Error> {
        self.inner.exec(container_id, command, stdio).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>, Error> {
        let (inner, reference) = (self.inner.clone(), reference.to_owned());
        blocking(move || inner.images.find(&reference).map_err(image_error)).await
    }

    async fn list_images(&self) -> Result<Vec<Image>, Error> {
        let inner = self.inner.clone();
        blocking(move || inner.images.list().map_err(image_error)).await
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.inner.events.subscribe()
    }

    async fn log_path(&self, container_id: &str) -> Result<PathBuf, Error> {
        Ok(self.inner.record(container_id)?.start.log.clone())
    }

    async fn sandbox_pid(&self, sandbox_id: &str) -> Result<i32, Error> {
        let state = self.inner.state.lock();
        let entry = state.sandboxes.get(sandbox_id).filter(|entry| entry.alive);
        entry.map(|entry| entry.pid).ok_or_else(|| not_found("sandbox", sandbox_id))
    }
}

impl SandboxEntry {
    fn as_found(&self) -> Sandbox {
        Sandbox {
            id: self.record.id.clone(),
            spec: self.record.spec.clone(),
            ready: self.alive && self.record.phase == Phase::Ready,
            ips: self.record.ips.clone(),
            created_at_ns: self.record.created_at_ns,
        }
    }
}

impl ContainerEntry {
    fn as_found(&self) -> Container {
        Container {
            id: self.record.id.clone(),
            sandbox_id: self.record.sandbox_id.clone(),
            spec: self.record.spec.clone(),
            image_id: self.record.image_id.clone(),
            state: self.state.borrow().clone(),
            created_at_ns: self.record.created_at_ns,
        }
    }
}

impl Inner {
    fn new(config: Config, cancel: CancellationToken) -> Result<Self, Error> {
        let paths = config.paths();
        for folder in [paths.sandboxes(), paths.containers()] {
            folders::make_spread(&folder).map_err(records::io_error("make", &folder))?;
        }
        let folders = [paths.run.join("sandboxes"), paths.run.join("netns"), paths.seccomp()];
        folders.iter().try_for_each(|folder| records::make_folder(folder))?;
        let images = ImageStore::open(config.image_dir()).map_err(image_error)?;
        let hierarchies = Hierarchies::detect(&config.cgroup_root)
            .map_err(records::io_error("find cgroups in", &config.cgroup_root))?;
        if hierarchies.is_empty() {
            tracing::warn!(path = %config.cgroup_root.display(), "no control groups are mounted; no limit will hold");
        }
        let network = Network { bin_folders: config.cni_bin_dirs, config_folder: config.cni_conf_dir };
        Ok(Self {
            init_path: config.init_path,
            paths,
            hierarchies,
            images,
            network,
            state: Mutex::default(),
            events: broadcast::channel(EVENTS).0,
            cancel,
            warned: Mutex::default(),
        })
    }

    fn record(&self, container_id: &str) -> Result<Arc<ContainerRecord>, Error> {
        let state = self.state.lock();
        let entry = state.containers.get(container_id).ok_or_else(|| not_found("container", container_id))?;
        Ok(entry.record.clone())
    }

    fn emit(&self, event: RuntimeEvent) {
        // Nobody listening is fine: a listener lists when it comes.
        let _ = self.events.send(event);
    }

    /// Says once what the kernel refuses: it will refuse it for every container.
    fn warn_refused(&self, refused: Vec<Refused>) {
        for refused in refused {
            let file =
                refused.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if self.warned.lock().insert(file) {
                tracing::warn!(error = %refused.source, path = %refused.path.display(), value = refused.value,
                    "the kernel refuses a cgroup setting; containers run without it");
            }
        }
    }
}

/// Runs what blocks on disk away from the reactor.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    joined(tokio::task::spawn_blocking(work).await)
}

fn joined<T>(result: Result<Result<T, Error>, tokio::task::JoinError>) -> Result<T, Error> {
    match result {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_cancelled) => {
                Err(Error::Invalid { what: "finish", reason: "the runtime is shutting down".to_owned() })
            }
        },
    }
}

fn not_found(what: &'static str, id: &str) -> Error {
    Error::NotFound { what, id: id.to_owned() }
}

fn network_error(error: crate::cni::NetworkError) -> Error {
    Error::Network(chain(&error))
}

fn image_error(error: ImageError) -> Error {
    match error {
        ImageError::NotFound(id) => Error::NotFound { what: "image", id },
        ImageError::Io { op, path, source } => Error::Io { op, path, source },
        other @ (ImageError::Reference(_)
        | ImageError::InUse { .. }
        | ImageError::Format(_)
        | ImageError::Digest { .. }
        | ImageError::Layer { .. }) => Error::Invalid { what: "use an image", reason: chain(&other) },
    }
}

fn now_ns() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// 64 hexadecimal digits.
fn new_id() -> String {
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}
