//! What all parts of the kubelet share: configuration, client, runtime, caches, and the table of pods.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;
use tokio::sync::mpsc;
use weft_agent_runtime::Runtime;

use crate::config::Config;
use crate::events::{self, Recorder};
use crate::metrics::Metrics;
use crate::node::Machine;
use crate::objects::Objects;
use crate::services::Services;
use crate::tokens::Tokens;

/// A pod as its worker sees it, for the server.
#[derive(Clone, Debug)]
pub(crate) struct PodView {
    /// The object, with the newest status.
    pub(crate) pod: Arc<Pod>,
    /// Container name → ids, oldest attempt first, with the attempt.
    pub(crate) containers: BTreeMap<String, Vec<(u32, String)>>,
}

/// Shared by every task.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) client: kube::Client,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) events: Recorder,
    pub(crate) objects: Objects,
    pub(crate) services: Services,
    pub(crate) tokens: Tokens,
    pub(crate) metrics: Metrics,
    pub(crate) machine: Machine,
    /// By namespace and name.
    pub(crate) pods: RwLock<BTreeMap<(String, String), PodView>>,
}

impl Shared {
    /// Makes it, and the queue of Events that [`events::run`] is to send.
    pub(crate) fn new(
        config: Config,
        client: kube::Client,
        runtime: Arc<dyn Runtime>,
    ) -> (Arc<Self>, mpsc::Receiver<events::Posting>) {
        let (recorder, queue) = Recorder::new(&config.node_name);
        let machine = Machine::read(&config);
        let shared = Self {
            objects: Objects::new(client.clone()),
            services: Services::default(),
            tokens: Tokens::default(),
            metrics: Metrics::new(&config.node_name),
            events: recorder,
            pods: RwLock::default(),
            machine,
            config,
            client,
            runtime,
        };
        (Arc::new(shared), queue)
    }
}
