//! The life of a container: created on disk, started by its sandbox's init, ended, removed.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use weft_agent_runtime_init::wire::{self, Exec, Reply, Request, Status};

use super::init::Connection;
use super::records::{self, ContainerRecord, Phase, SandboxRecord};
use super::{ContainerEntry, Inner, blocking, image_error, new_id, not_found, now_ns, seccomp, spec};
use crate::{ContainerSpec, ContainerState, Error, Exit, RuntimeEvent, Stdio};

/// After SIGKILL only a process stuck in the kernel lives on.
const KILLED: Duration = Duration::from_secs(30);
/// As upstream says "could not be started".
const START_FAILED: i32 = 128;
/// The exit code of what was killed, and of what was lost with its init.
const SIGKILLED: i32 = 128 + libc::SIGKILL;

impl Inner {
    pub(super) async fn create_container(
        self: &Arc<Self>,
        sandbox_id: &str,
        spec: ContainerSpec,
    ) -> Result<String, Error> {
        let sandbox = self.ready_sandbox(sandbox_id)?;
        let inner = self.clone();
        let record = blocking(move || inner.make_container(&sandbox, spec)).await?;
        let id = record.id.clone();
        let entry =
            ContainerEntry { record: Arc::new(record), state: watch::Sender::new(ContainerState::Created) };
        self.state.lock().containers.insert(id.clone(), entry);
        Ok(id)
    }

    fn ready_sandbox(&self, id: &str) -> Result<SandboxRecord, Error> {
        let state = self.state.lock();
        let entry = state.sandboxes.get(id).ok_or_else(|| not_found("sandbox", id))?;
        if !entry.alive || entry.record.phase != Phase::Ready {
            return Err(Error::Invalid {
                what: "create a container",
                reason: format!("sandbox {id} is not ready"),
            });
        }
        Ok(entry.record.clone())
    }

    fn make_container(&self, sandbox: &SandboxRecord, spec: ContainerSpec) -> Result<ContainerRecord, Error> {
        let id = new_id();
        let made = self.fill_container(&id, sandbox, spec);
        if made.is_err()
            && let Err(error) = self.discard_container(&id, sandbox)
        {
            tracing::warn!(container = id, error = super::chain(&error), "cannot undo a container");
        }
        made
    }

    fn fill_container(
        &self,
        id: &str,
        sandbox: &SandboxRecord,
        spec: ContainerSpec,
    ) -> Result<ContainerRecord, Error> {
        let folder = self.paths.container(id);
        ["upper", "work", "root"].iter().try_for_each(|part| records::make_folder(&folder.join(part)))?;
        let image = self.images.acquire(&spec.image, id).map_err(image_error)?;
        let layers = self.images.layers_folder();
        let seccomp = seccomp::filters(&self.paths.seccomp(), &spec.security)?;
        let context = spec::Context {
            paths: &self.paths,
            hierarchies: &self.hierarchies,
            sandbox,
            image: &image,
            layers,
            seccomp,
        };
        let start = context.start(id, &spec)?;
        let group = self.paths.leaf_cgroup(&sandbox.spec, id);
        let refused =
            self.hierarchies.create(&group).map_err(records::io_error("make the cgroup", &group))?;
        self.warn_refused(refused);
        self.warn_refused(self.hierarchies.limit(&group, &spec::limits(&spec.resources)));
        if !spec.security.privileged {
            self.warn_refused(self.hierarchies.restrict_devices(&group).err().into_iter().collect());
        }
        let record = ContainerRecord {
            id: id.to_owned(),
            sandbox_id: sandbox.id.clone(),
            image_id: image.id.clone(),
            created_at_ns: now_ns(),
            stop_signal: spec::stop_signal(&image.defaults),
            spec,
            start,
        };
        self.paths.save_container(&record)?;
        Ok(record)
    }

    fn discard_container(&self, id: &str, sandbox: &SandboxRecord) -> Result<(), Error> {
        if !self.hierarchies.remove(&self.paths.leaf_cgroup(&sandbox.spec, id)) {
            tracing::warn!(container = id, "a cgroup is left; the next start of the agent removes it");
        }
        self.images.release(id).map_err(image_error)?;
        records::remove(&self.paths.container(id))
    }

    async fn connect(&self, sandbox_id: &str) -> Result<Connection, Error> {
        let folder = self.paths.sandbox_run(sandbox_id);
        Connection::open(&folder).await.map_err(records::io_error("reach the init in", &folder))
    }

    pub(super) async fn start_container(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let record = self.record(id)?;
        if *self.state_of(id)?.borrow() != ContainerState::Created {
            return Err(Error::Invalid {
                what: "start a container",
                reason: format!("{id} has been started before"),
            });
        }
        let mut connection = self.connect(&record.sandbox_id).await?;
        match connection.ask(&Request::Start(Box::new(record.start.clone()))).await? {
            Reply::Started { started_at_ns, .. } => {
                self.change(id, |state| {
                    // Its end may have been heard of already.
                    if *state == ContainerState::Created {
                        *state = ContainerState::Running { started_at_ns };
                    }
                });
                Ok(())
            }
            Reply::Failed { message } => {
                let exit = wire::Exit {
                    code: START_FAILED,
                    finished_at_ns: now_ns(),
                    message: message.clone(),
                    ..wire::Exit::default()
                };
                self.end(id, exit).await?;
                Err(Error::Start { name: record.spec.name.clone(), reason: message })
            }
            other @ (Reply::Done | Reply::Exited { .. } | Reply::Containers(_) | Reply::Event(_)) => {
                Err(unexpected("start a container", &other))
            }
        }
    }

    /// Records an end that the init did not record itself.
    async fn end(self: &Arc<Self>, id: &str, exit: wire::Exit) -> Result<(), Error> {
        let path = self.paths.container(id).join(wire::EXIT_FILE);
        let copy = exit.clone();
        blocking(move || records::save(&path, &copy)).await?;
        self.exited(id, exit);
        Ok(())
    }

    fn state_of(&self, id: &str) -> Result<watch::Receiver<ContainerState>, Error> {
        let state = self.state.lock();
        state
            .containers
            .get(id)
            .map(|entry| entry.state.subscribe())
            .ok_or_else(|| not_found("container", id))
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut ContainerState)) {
        if let Some(entry) = self.state.lock().containers.get(id) {
            entry.state.send_modify(change);
        }
    }

    /// What an init says of a container.
    pub(super) fn observe(&self, status: Status) {
        match status.exit {
            Some(exit) => self.exited(&status.id, exit),
            None => self.change(&status.id, |state| {
                *state = ContainerState::Running { started_at_ns: status.started_at_ns };
            }),
        }
    }

    /// Sets a container's end, once, and tells everybody.
    pub(super) fn exited(&self, id: &str, exit: wire::Exit) {
        let state = self.state.lock();
        let Some(entry) = state.containers.get(id) else { return };
        let news = entry.state.send_if_modified(|state| {
            let news = !matches!(state, ContainerState::Exited(_));
            if news {
                *state = ContainerState::Exited(from_wire(exit));
            }
            news
        });
        let sandbox = state.sandboxes.get(&entry.record.sandbox_id);
        let pod_uid = sandbox.map(|sandbox| sandbox.record.spec.uid.clone()).unwrap_or_default();
        drop(state);
        if news {
            self.emit(RuntimeEvent::ContainerExited { pod_uid, container_id: id.to_owned() });
        }
    }

    /// Ends the containers of an init that is dead: by what it wrote, or as killed if it could not.
    pub(super) async fn bury_containers(self: &Arc<Self>, sandbox_id: &str) -> Result<(), Error> {
        let open: Vec<String> = {
            let state = self.state.lock();
            let of_sandbox = state.containers.values().filter(|entry| entry.record.sandbox_id == sandbox_id);
            let open = of_sandbox.filter(|entry| !matches!(*entry.state.borrow(), ContainerState::Exited(_)));
            open.map(|entry| entry.record.id.clone()).collect()
        };
        for id in open {
            let folder = self.paths.container(&id);
            let (exit, run) = blocking(move || {
                let exit: Option<wire::Exit> = records::load(&folder.join(wire::EXIT_FILE))?;
                let run: Option<wire::Run> = records::load(&folder.join(wire::RUN_FILE))?;
                Ok((exit, run))
            })
            .await?;
            match (exit, run) {
                (Some(exit), _) => self.exited(&id, exit),
                (None, Some(run)) => {
                    let exit = wire::Exit {
                        code: SIGKILLED,
                        started_at_ns: run.started_at_ns,
                        finished_at_ns: now_ns(),
                        oom_killed: false,
                        message: "the sandbox's init died".to_owned(),
                    };
                    self.end(&id, exit).await?;
                }
                // Created and never started: so it stays.
                (None, None) => {}
            }
        }
        Ok(())
    }

    pub(super) async fn stop_container(self: &Arc<Self>, id: &str, grace: Duration) -> Result<(), Error> {
        let record = self.record(id)?;
        let mut state = self.state_of(id)?;
        if !matches!(*state.borrow(), ContainerState::Running { .. }) {
            return Ok(());
        }
        if !grace.is_zero() {
            self.signal(&record, record.stop_signal).await?;
            if tokio::time::timeout(grace, ended(&mut state)).await.is_ok() {
                return Ok(());
            }
        }
        self.signal(&record, libc::SIGKILL).await?;
        let timeout = Error::Timeout { what: "killing a container", seconds: KILLED.as_secs() };
        tokio::time::timeout(KILLED, ended(&mut state)).await.map_err(|_elapsed| timeout)
    }

    async fn signal(&self, record: &ContainerRecord, signal: i32) -> Result<(), Error> {
        // A dead init has no containers; whoever listens to it says so.
        let Ok(mut connection) = self.connect(&record.sandbox_id).await else { return Ok(()) };
        match connection.ask(&Request::Signal { container: record.id.clone(), signal }).await? {
            Reply::Failed { message } => Err(Error::Invalid { what: "signal a container", reason: message }),
            Reply::Done => Ok(()),
            other @ (Reply::Started { .. }
            | Reply::Exited { .. }
            | Reply::Containers(_)
            | Reply::Event(_)) => Err(unexpected("signal a container", &other)),
        }
    }

    pub(super) async fn remove_container(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let Ok(record) = self.record(id) else { return Ok(()) };
        self.stop_container(id, Duration::ZERO).await?;
        if let Ok(mut connection) = self.connect(&record.sandbox_id).await {
            connection.ask(&Request::Forget { container: id.to_owned() }).await?;
        }
        let sandbox =
            self.state.lock().sandboxes.get(&record.sandbox_id).map(|entry| entry.record.spec.clone());
        if let Some(spec) = sandbox {
            self.remove_group(self.paths.leaf_cgroup(&spec, id)).await?;
        }
        let (inner, owned) = (self.clone(), id.to_owned());
        blocking(move || {
            inner.images.release(&owned).map_err(image_error)?;
            let folder = inner.paths.container(&owned);
            // The record goes last: what a crash leaves is found again.
            records::remove(&folder.join("upper"))?;
            records::remove(&folder)
        })
        .await?;
        self.state.lock().containers.remove(id);
        Ok(())
    }

    pub(super) async fn exec(
        self: &Arc<Self>,
        id: &str,
        command: Vec<String>,
        stdio: Stdio,
    ) -> Result<i32, Error> {
        let record = self.record(id)?;
        if !matches!(*self.state_of(id)?.borrow(), ContainerState::Running { .. }) {
            return Err(Error::Invalid { what: "exec", reason: format!("container {id} is not running") });
        }
        let Stdio { stdin, stdout, stderr, tty } = stdio;
        let request = Request::Exec(Exec {
            container: id.to_owned(),
            argv: command,
            stdin: stdin.is_some(),
            stdout: stdout.is_some(),
            stderr: stderr.is_some(),
            tty: tty.is_some(),
        });
        let descriptors: Vec<_> = [stdin, stdout, stderr, tty].into_iter().flatten().collect();
        let mut connection = self.connect(&record.sandbox_id).await?;
        let folder = self.paths.sandbox_run(&record.sandbox_id);
        connection
            .send_with(&request, &descriptors)
            .await
            .map_err(records::io_error("talk to the init in", &folder))?;
        // Only the command may hold them now: the other ends shall see it end.
        drop(descriptors);
        match connection.receive().await.map_err(records::io_error("talk to the init in", &folder))? {
            Some(Reply::Exited { code }) => Ok(code),
            Some(Reply::Failed { message }) => {
                Err(Error::Start { name: record.spec.name.clone(), reason: message })
            }
            Some(other) => Err(unexpected("exec", &other)),
            None => Err(Error::Invalid { what: "exec", reason: "the sandbox's init died".to_owned() }),
        }
    }
}

fn unexpected(what: &'static str, answer: &Reply) -> Error {
    Error::Invalid { what, reason: format!("unexpected answer {answer:?}") }
}

async fn ended(state: &mut watch::Receiver<ContainerState>) {
    // An error means that the container has been removed.
    let _ = state.wait_for(|state| matches!(state, ContainerState::Exited(_))).await;
}

pub(super) fn from_wire(exit: wire::Exit) -> Exit {
    Exit {
        code: exit.code,
        started_at_ns: exit.started_at_ns,
        finished_at_ns: exit.finished_at_ns,
        oom_killed: exit.oom_killed,
        message: exit.message,
    }
}
