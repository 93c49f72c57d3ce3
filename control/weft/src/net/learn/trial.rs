//! The policy on trial, for the time of one watch.
//!
//! It carries the number of the run that put it. A later run takes it over, be the earlier one dead or alive: one that lives sees that
//! at its next look, and leaves the policy to its successor.

use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, ResourceExt as _};

/// Its name.
const NAME: &str = "weft-policy-learn";
/// What makes it drop nothing.
const ON_TRIAL: &str = "weft.dev/dry-run";
/// Which run put it. A policy of that name without it is somebody's own.
const RUN: &str = "weft.dev/learn-run";
/// Races that are run again before they are an error.
const ATTEMPTS: usize = 5;
/// How long its removal may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The policy of this run.
pub(super) struct Trial {
    api: Api<NetworkPolicy>,
    namespace: String,
    run: String,
}

impl Trial {
    /// One that is not there yet.
    pub(super) fn new(client: &kube::Client, namespace: &str) -> Self {
        let api = Api::namespaced(client.clone(), namespace);
        Self { api, namespace: namespace.to_owned(), run: format!("{:016x}", rand::random::<u64>()) }
    }

    /// Makes it, or takes over what another run has left.
    pub(super) async fn put(&self) -> anyhow::Result<()> {
        let cannot = || format!("cannot put the NetworkPolicy {self}");
        for _ in 0..ATTEMPTS {
            let present = self.api.get_opt(NAME).await.with_context(cannot)?;
            let mut policy = self.policy();
            let put = match present {
                None => self.api.create(&PostParams::default(), &policy).await,
                Some(present) if run(&present).is_none() => {
                    bail!(
                        "there is a NetworkPolicy {self} that is not of `weft policy learn`; give it another name"
                    );
                }
                Some(present) => {
                    super::say(format_args!("taking over the NetworkPolicy {self} of an earlier run"));
                    policy.metadata.resource_version = present.resource_version();
                    self.api.replace(NAME, &PostParams::default(), &policy).await
                }
            };
            match put {
                Err(error) if is(&error, &[404, 409]) => {}
                put => return put.map(drop).with_context(cannot),
            }
        }
        bail!("cannot put the NetworkPolicy {self}: others keep changing it")
    }

    /// Whether it is there and still of this run: else flows have been missed.
    pub(super) async fn check(&self) -> anyhow::Result<()> {
        let present = self.api.get_opt(NAME).await;
        let present = present.with_context(|| format!("cannot get the NetworkPolicy {self}"))?;
        match present.as_ref().map(run) {
            Some(run) if run == Some(self.run.as_str()) => Ok(()),
            Some(_) => bail!("another run has taken over the NetworkPolicy {self}"),
            None => bail!("somebody has removed the NetworkPolicy {self}"),
        }
    }

    /// Removes it, unless it is another run's.
    pub(super) async fn remove(&self) -> anyhow::Result<()> {
        let by_hand = || format!("cannot remove the NetworkPolicy {self}; remove it by hand");
        let removed = tokio::time::timeout(PATIENCE, self.remove_patiently()).await;
        removed.map_err(anyhow::Error::new).flatten().with_context(by_hand)
    }

    async fn remove_patiently(&self) -> anyhow::Result<()> {
        loop {
            let Some(present) = self.api.get_opt(NAME).await? else { return Ok(()) };
            if run(&present) != Some(self.run.as_str()) {
                return Ok(());
            }
            let (uid, resource_version) = (present.uid(), present.resource_version());
            let preconditions = Some(Preconditions { uid, resource_version });
            match self.api.delete(NAME, &DeleteParams { preconditions, ..DeleteParams::default() }).await {
                Err(error) if is(&error, &[404, 409]) => {}
                deleted => return Ok(deleted.map(drop)?),
            }
        }
    }

    fn policy(&self) -> NetworkPolicy {
        let annotations = [(ON_TRIAL, "true"), (RUN, self.run.as_str())];
        let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned()));
        NetworkPolicy {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                annotations: Some(annotations.into()),
                ..ObjectMeta::default()
            },
            spec: Some(NetworkPolicySpec {
                pod_selector: Some(LabelSelector::default()),
                policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
                ..NetworkPolicySpec::default()
            }),
        }
    }
}

impl std::fmt::Display for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{NAME}", self.namespace)
    }
}

fn run(policy: &NetworkPolicy) -> Option<&str> {
    policy.annotations().get(RUN).map(String::as_str)
}

fn is(error: &kube::Error, codes: &[u16]) -> bool {
    matches!(error, kube::Error::Api(status) if codes.contains(&status.code))
}
