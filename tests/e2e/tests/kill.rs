//! `kill -9` of weft, again and again: what was acknowledged stays, containers run on, Services answer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{cluster, eventually, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const KILLS: usize = 20;
const WRITERS: usize = 4;
const NAMESPACE: &str = "writes";
const SERVICE: &str = "apiVersion: v1
kind: Namespace
metadata: {name: writes}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
";

#[test]
fn twenty_times() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("kill::twenty_times", "kill", &[])? else { return Ok(()) };
    let seed =
        std::env::var("WEFT_SEED").ok().map_or_else(|| Ok(rand::random()), |seed| seed.parse::<u64>())?;
    eprintln!("WEFT_SEED={seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    cluster.apply(&nginx("web", 3))?;
    cluster.apply(SERVICE)?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let before = containers(&cluster)?;
    assert_eq!(before.len(), 3, "{before:?}");
    let address = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let address = SocketAddr::new(address.parse()?, 80);
    let clients = Clients::start(&cluster.netns, address, 1, Duration::from_millis(2))?;
    wait_until("the ClusterIP answers", Duration::from_secs(10), || {
        Ok((clients.answered() > 10).then_some(()))
    })?;
    let mut expected = BTreeMap::new();
    for round in 0..KILLS {
        let writers = Writers::start(&cluster, round)?;
        let moment = Instant::now() + Duration::from_millis(random.random_range(0..1500));
        wait_until("the moment comes", Duration::from_secs(5), || {
            Ok((Instant::now() >= moment).then_some(()))
        })?;
        let process = cluster.process().context("weft runs")?;
        process.kill()?;
        process.wait()?;
        expected.extend(writers.stop()?);
        let answered = clients.answered();
        let waited = wait_until("the ClusterIP answers while weft is dead", Duration::from_secs(5), || {
            Ok((clients.answered() >= answered + 20).then_some(()))
        });
        if let Err(error) = waited {
            let lost = clients.stop()?.lost;
            let log = cluster.log_tail();
            return Err(error.context(format!("{} lost, at last {:?}\n{log}", lost.len(), lost.last())));
        }
        cluster.up().with_context(|| format!("start after kill {round}"))?;
        let count = check(&cluster, &expected).with_context(|| format!("after kill {round}"))?;
        eprintln!("kill {round}: {count} objects as they were acknowledged");
        assert_eq!(containers(&cluster)?, before, "after kill {round}");
    }
    assert!(expected.len() > KILLS * WRITERS, "only {} objects were written", expected.len());
    let ready = ["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"];
    eventually(&cluster, &ready, |count| count == "3")?;
    assert_eq!(containers(&cluster)?, before, "at the end");
    let tally = clients.stop()?;
    eprintln!("{} requests answered, {} lost", tally.answered(), tally.lost.len());
    assert_eq!(tally.lost, Vec::<String>::new());
    cluster.purge()
}

/// Each container's pod, address, id, restarts and start as the API tells, and its processes with their start in the kernel's ticks.
fn containers(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let columns = "jsonpath={range .items[*]}{.metadata.name} {.status.podIP} {.status.containerStatuses[0].containerID} \
                   {.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].state.running.startedAt}\
                   {\"\\n\"}{end}";
    let rows = cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", columns])?;
    let mut containers = BTreeMap::new();
    for row in rows.lines() {
        let id = row.split(' ').find_map(|word| word.strip_prefix("weft://")).context("a container's id")?;
        let mut facts = vec![row.to_owned()];
        facts.extend(processes(id)?);
        assert_eq!(facts.len(), 3, "nginx and its worker: {facts:?}");
        containers.insert(id.to_owned(), facts);
    }
    Ok(containers)
}

/// The processes in a container's cgroup, which is named after its id: number and start.
fn processes(container: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        // Any other process may end between two looks.
        let Ok(cgroups) = std::fs::read_to_string(path.join("cgroup")) else { continue };
        if !cgroups.contains(container) {
            continue;
        }
        let stat = std::fs::read_to_string(path.join("stat"))?;
        // The name in brackets may hold spaces; the start is the 20th word behind it.
        let start =
            stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19)).context("a start time")?;
        found.push(format!("{} {start}", path.display()));
    }
    found.sort();
    Ok(found)
}

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
struct Written {
    acknowledged: Step,
    tried: Step,
}

/// Threads that write until they are stopped or weft is gone.
struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<BTreeMap<String, Written>>>>,
}

impl Writers {
    fn start(cluster: &Cluster, round: usize) -> anyhow::Result<Self> {
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

    fn stop(self) -> anyhow::Result<BTreeMap<String, Written>> {
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
fn check(cluster: &Cluster, expected: &BTreeMap<String, Written>) -> anyhow::Result<usize> {
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
