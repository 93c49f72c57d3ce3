//! A test's own namespace in the cluster, and what tests do there again and again.

use std::fmt::Debug;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use kube::api::{Api, AttachParams, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::bed::Bed;

/// How long anything may take to come true. Generous: the tests run beside each other on few cores.
const PATIENCE: Duration = Duration::from_secs(45);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// A namespace, and a client.
#[derive(Clone)]
pub struct Site {
    /// The administrator's client.
    pub client: Client,
    /// The namespace.
    pub namespace: String,
}

/// What a command in a container said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
    /// Whether it ended with 0.
    pub success: bool,
}

impl Site {
    pub(crate) async fn open(bed: &Bed, namespace: &str) -> anyhow::Result<Self> {
        let file = kube::config::Kubeconfig::read_from(bed.cluster.kubeconfig())?;
        let options = kube::config::KubeConfigOptions::default();
        let mut config = kube::Config::from_custom_kubeconfig(file, &options).await?;
        // A refusal is what some tests ask for; the client would ask again.
        config.default_retry = false;
        let client = Client::try_from(config)?;
        let site = Self { client, namespace: namespace.to_owned() };
        let object = serde_json::from_value(json!({"metadata": {"name": namespace}}))?;
        Api::<Namespace>::all(site.client.clone()).create(&PostParams::default(), &object).await?;
        let accounts = site.api::<ServiceAccount>();
        until("the namespace has its service account", async || Ok(accounts.get_opt("default").await?))
            .await?;
        Ok(site)
    }

    pub(crate) async fn close(&self) -> anyhow::Result<()> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        namespaces.delete(&self.namespace, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Access to a kind in the namespace.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Creates an object.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn create<K>(&self, object: Value) -> anyhow::Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + Serialize
            + DeserializeOwned,
    {
        let name = object["metadata"]["name"].to_string();
        let object = serde_json::from_value(object)?;
        let made = self.api::<K>().create(&PostParams::default(), &object).await;
        made.with_context(|| format!("create {} {name}", K::kind(&())))
    }

    /// Creates a Service from its spec.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn service(&self, name: &str, spec: Value) -> anyhow::Result<Service> {
        self.create(json!({"metadata": {"name": name}, "spec": spec})).await
    }

    /// Patches an object with a JSON merge patch.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn merge<K>(&self, name: &str, patch: Value) -> anyhow::Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        Ok(self.api::<K>().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?)
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// If the server refuses it.
    pub async fn delete<K>(&self, name: &str) -> anyhow::Result<()>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        self.api::<K>().delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Creates pods and waits until all of them are Ready; answers them with their addresses.
    ///
    /// # Errors
    /// If one is refused or doesn't get there.
    pub async fn pods(&self, pods: Vec<Value>) -> anyhow::Result<Vec<Pod>> {
        let mut names = Vec::new();
        for pod in pods {
            names.push(self.create::<Pod>(pod).await?.name_any());
        }
        let api = self.api::<Pod>();
        let mut ready = Vec::new();
        for name in names {
            let what = format!("pod {name} is Ready");
            let waited = until(&what, async || {
                let pod = api.get(&name).await?;
                let is_ready = condition(&pod, "Ready");
                ensure!(is_ready, "its status is {}", serde_json::to_string(&pod.status)?);
                Ok(Some(pod))
            });
            ready.push(waited.await?);
        }
        Ok(ready)
    }

    /// Creates one pod and waits for it.
    ///
    /// # Errors
    /// As [`Site::pods`].
    pub async fn pod(&self, pod: Value) -> anyhow::Result<Pod> {
        let mut ready = self.pods(vec![pod]).await?;
        ready.pop().context("one pod was asked for")
    }

    /// Names and internal addresses of the nodes.
    ///
    /// # Errors
    /// If they can't be listed.
    pub async fn nodes(&self) -> anyhow::Result<Vec<(String, IpAddr)>> {
        let list = Api::<Node>::all(self.client.clone()).list(&ListParams::default()).await?;
        let mut nodes = Vec::new();
        for node in list {
            let addresses = node.status.as_ref().and_then(|status| status.addresses.clone());
            let internal = addresses.into_iter().flatten().find(|a| a.type_ == "InternalIP");
            let address = internal.context("a node has no InternalIP")?.address.parse()?;
            nodes.push((node.name_any(), address));
        }
        nodes.sort();
        Ok(nodes)
    }

    /// Runs a command in a pod's first container.
    ///
    /// # Errors
    /// If it can't be run; not if it fails.
    pub async fn exec(&self, pod: &str, command: &[&str]) -> anyhow::Result<Said> {
        self.exec_with(pod, command, "").await
    }

    /// The same, with something on its standard input.
    ///
    /// # Errors
    /// If it can't be run; not if it fails.
    pub async fn exec_with(&self, pod: &str, command: &[&str], input: &str) -> anyhow::Result<Said> {
        let run = tokio::time::timeout(PATIENCE, self.run(pod, command, input));
        run.await.with_context(|| format!("{command:?} in {pod} doesn't end"))?
    }

    async fn run(&self, pod: &str, command: &[&str], input: &str) -> anyhow::Result<Said> {
        let params = AttachParams::default().stdin(!input.is_empty());
        let mut process = self
            .api::<Pod>()
            .exec(pod, command.iter().copied(), &params)
            .await
            .with_context(|| format!("exec in {pod}"))?;
        if let Some(mut stdin) = process.stdin() {
            stdin.write_all(input.as_bytes()).await?;
            stdin.shutdown().await?;
        }
        let (mut stdout, mut stderr) = (process.stdout(), process.stderr());
        let status = process.take_status();
        let (mut out, mut err) = (String::new(), String::new());
        let read_out = async {
            match &mut stdout {
                Some(stream) => stream.read_to_string(&mut out).await,
                None => Ok(0),
            }
        };
        let read_err = async {
            match &mut stderr {
                Some(stream) => stream.read_to_string(&mut err).await,
                None => Ok(0),
            }
        };
        let (read_out, read_err) = futures::join!(read_out, read_err);
        read_out?;
        read_err?;
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        let status = status.with_context(|| format!("exec in {pod} ended without a status"))?;
        Ok(Said { out, err, success: status.status.as_deref() == Some("Success") })
    }

    /// Sends a request that no typed call covers; answers its JSON.
    ///
    /// # Errors
    /// If it isn't answered with success.
    pub async fn raw(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let mut request = http::Request::builder().method(method).uri(path);
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        Ok(self.client.request(request.body(bytes)?).await?)
    }

    /// Waits until something comes true.
    ///
    /// # Errors
    /// With what was awaited and the last error, after 45 seconds.
    pub async fn until<T>(
        &self,
        what: &str,
        look: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        until(what, look).await
    }
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = look().await;
        match seen {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() < deadline => {}
            Err(_) if Instant::now() < deadline => {}
            Ok(None) => anyhow::bail!("waited in vain until {what}"),
            Err(error) => return Err(error.context(format!("waited in vain until {what}"))),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn condition(pod: &Pod, name: &str) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == name && c.status == "True")
}

/// A pod's address.
///
/// # Errors
/// If it has none yet.
pub fn address_of(pod: &Pod) -> anyhow::Result<IpAddr> {
    let ip = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref());
    Ok(ip.with_context(|| format!("{} has no address", pod.name_any()))?.parse()?)
}

/// A pod's node.
///
/// # Errors
/// If it has none yet.
pub fn node_of(pod: &Pod) -> anyhow::Result<String> {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    node.with_context(|| format!("{} is on no node", pod.name_any()))
}

/// A pod that serves on these ports (`80/tcp`, `80/udp=name`) and can ask; labelled `app: <app>`.
#[must_use]
pub fn server(name: &str, app: &str, ports: &[&str]) -> Value {
    let command: Vec<&str> = ["weft-probe", "serve"].into_iter().chain(ports.iter().copied()).collect();
    json!({
        "metadata": {"name": name, "labels": {"app": app}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "containers": [{"name": "main", "image": "weft-probe:1", "command": command}],
        },
    })
}
