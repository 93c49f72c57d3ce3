//! Threads that write ConfigMaps through kills of the server, and what must be there afterwards.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::json;
use weft_tests_harness::cluster::Cluster;

/// How many write at once.
pub const WRITERS: usize = 4;
/// Where they write; the caller makes it.
pub const NAMESPACE: &str = "writes";

/// How far the life of a ConfigMap has got: made, changed, deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Nothing,
    Created,
    Patched,
    Deleted,
}

/// The last step that was acknowledged and the last that was tried.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    acknowledged: Step,
    tried: Step,
}

/// Threads that write until they are stopped or weft is gone.
#[derive(Debug)]
pub struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<BTreeMap<String, Written>>>>,
}

impl Writers {
    /// Starts them; `round` goes into the names, so that every round writes new objects.
    ///
    /// # Errors
    /// If the namespace is gone.
    pub fn start(cluster: &Cluster, round: usize) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for writer in 0..WRITERS {
            let (kubeconfig, stop) = (cluster.kubeconfig(), Arc::clone(&stop));
            threads.push(cluster.netns.thread(move || {
                runtime()?.block_on(async {
                    let api = config_maps(kubeconfig).await?;
                    let mut written = BTreeMap::new();
                    for number in 0.. {
                        let name = format!("w-{round}-{writer}-{number}");
                        let outcome = live(&api, &name, number).await?;
                        written.insert(name, outcome);
                        if outcome.acknowledged != outcome.tried || stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                    Ok(written)
                })
            })?);
        }
        Ok(Self { stop, threads })
    }

    /// Ends them and tells what each object has come to.
    ///
    /// # Errors
    /// If a write was refused.
    pub fn stop(self) -> anyhow::Result<BTreeMap<String, Written>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = BTreeMap::new();
        for thread in self.threads {
            all.extend(thread.join().map_err(|panic| anyhow::anyhow!("a writer panicked: {panic:?}"))??);
        }
        Ok(all)
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")
}

async fn config_maps(kubeconfig: PathBuf) -> anyhow::Result<Api<ConfigMap>> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Api::namespaced(kube::Client::try_from(config)?, NAMESPACE))
}

/// One ConfigMap's life; every third gets to its end, every other one is left changed or as it was made.
///
/// # Errors
/// If the API server refuses a write: dead it says nothing, and alive it has no reason to.
async fn live(api: &Api<ConfigMap>, name: &str, number: usize) -> anyhow::Result<Written> {
    let mut written = Written { acknowledged: Step::Nothing, tried: Step::Created };
    let made: ConfigMap =
        serde_json::from_value(json!({"metadata": {"name": name}, "data": content(name, Step::Created)}))?;
    if !acknowledged(api.create(&PostParams::default(), &made).await)? {
        return Ok(written);
    }
    written.acknowledged = Step::Created;
    if number.is_multiple_of(3) {
        return Ok(written);
    }
    written.tried = Step::Patched;
    let patch = json!({"data": content(name, Step::Patched)});
    if !acknowledged(api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await)? {
        return Ok(written);
    }
    written.acknowledged = Step::Patched;
    if number % 3 == 1 {
        return Ok(written);
    }
    written.tried = Step::Deleted;
    if acknowledged(api.delete(name, &DeleteParams::default()).await)? {
        written.acknowledged = Step::Deleted;
    }
    Ok(written)
}

fn acknowledged<T>(outcome: kube::Result<T>) -> anyhow::Result<bool> {
    match outcome {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) => bail!("refused: {status:?}"),
        Err(_) => Ok(false),
    }
}

/// What a ConfigMap holds at a step, derived from its name; large enough to span pages of the store.
fn content(name: &str, step: Step) -> BTreeMap<String, String> {
    let state = format!("{step:?}");
    BTreeMap::from([("body".to_owned(), format!("{name} {state} ").repeat(200)), ("state".to_owned(), state)])
}

/// Compares all that is stored with what was acknowledged; answers the number of objects.
///
/// # Errors
/// If an acknowledged write is lost, or an object is half there.
pub fn check(cluster: &Cluster, expected: &BTreeMap<String, Written>) -> anyhow::Result<usize> {
    let kubeconfig = cluster.kubeconfig();
    let listed = cluster.netns.thread(move || {
        runtime()?
            .block_on(async { Ok(config_maps(kubeconfig).await?.list(&ListParams::default()).await?.items) })
    })?;
    let listed = listed.join().map_err(|panic| anyhow::anyhow!("the reader panicked: {panic:?}"))??;
    let mut stored: BTreeMap<String, ConfigMap> = BTreeMap::new();
    for object in listed {
        let name = object.metadata.name.clone().context("a name")?;
        // The controllers give this one to every namespace.
        if name != "kube-root-ca.crt" {
            stored.insert(name, object);
        }
    }
    let count = stored.len();
    for (name, written) in expected {
        let found = match stored.remove(name) {
            Some(object) => whole(name, object)?,
            None if written.acknowledged == Step::Nothing => Step::Nothing,
            None => Step::Deleted,
        };
        let allowed = written.acknowledged..=written.tried;
        anyhow::ensure!(allowed.contains(&found), "{name} is {found:?}, but {written:?}");
    }
    anyhow::ensure!(stored.is_empty(), "nobody wrote {:?}", stored.keys());
    Ok(count)
}

/// The step that an object is at; its every byte must be that step's.
fn whole(name: &str, object: ConfigMap) -> anyhow::Result<Step> {
    let data = object.data.unwrap_or_default();
    let step = [Step::Created, Step::Patched].into_iter().find(|step| content(name, *step) == data);
    step.with_context(|| format!("{name} is half there: {data:?}"))
}
