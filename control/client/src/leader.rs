//! Owns leader election by a Lease, with upstream's timing: 15 s lease, 10 s to renew, 2 s between attempts.

use crate::{Class, classify, found};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const LEASE: Duration = Duration::from_secs(15);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);
/// Between attempts while the API server doesn't answer at all (it may be starting in this very process).
const UNREACHABLE_RETRY: Duration = Duration::from_millis(100);

/// Which lease, and who asks for it.
#[derive(Clone, Debug)]
pub struct Election {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Name of this candidate; the same after a restart, so that it takes its own lease over at once.
    pub identity: String,
}

/// What is to be written to the lease.
#[derive(Debug, PartialEq)]
enum Decision {
    /// Write this spec: the lease is ours, free, or has run out.
    Take(Box<LeaseSpec>),
    /// Somebody else holds it.
    Wait,
}

/// When this candidate last saw the lease change, by its own clock: other machines' clocks are not trusted.
struct Observation {
    spec: Option<LeaseSpec>,
    at: Instant,
}

fn decide(current: Option<&LeaseSpec>, observed_for: Duration, identity: &str, now: Timestamp) -> Decision {
    let holder = current.and_then(|s| s.holder_identity.as_deref()).unwrap_or_default();
    let ours = holder == identity;
    let duration = current.and_then(|s| s.lease_duration_seconds).and_then(|s| u64::try_from(s).ok());
    let expired = observed_for >= duration.map_or(LEASE, Duration::from_secs);
    if !(ours || holder.is_empty() || expired) {
        return Decision::Wait;
    }
    let transitions = current.and_then(|s| s.lease_transitions).unwrap_or(0);
    let kept = current.filter(|_| ours);
    Decision::Take(Box::new(LeaseSpec {
        holder_identity: Some(identity.to_owned()),
        lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
        acquire_time: kept.and_then(|s| s.acquire_time.clone()).or(Some(MicroTime(now))),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(if ours || current.is_none() { transitions } else { transitions + 1 }),
        preferred_holder: None,
        strategy: None,
    }))
}

struct Candidate<'a> {
    api: Api<Lease>,
    election: &'a Election,
    observed: Observation,
}

impl Candidate<'_> {
    /// One attempt to take or renew the lease. `Ok(true)`: it is ours now.
    async fn attempt(&mut self) -> kube::Result<bool> {
        let lease = found(self.api.get(&self.election.name).await)?;
        let spec = lease.as_ref().and_then(|l| l.spec.clone());
        if self.observed.spec != spec {
            self.observed = Observation { spec: spec.clone(), at: Instant::now() };
        }
        let age = self.observed.at.elapsed();
        let Decision::Take(new) = decide(spec.as_ref(), age, &self.election.identity, Timestamp::now())
        else {
            return Ok(false);
        };
        let (created, mut lease) = match lease {
            Some(lease) => (false, lease),
            None => (true, Lease { metadata: self.metadata(), ..Lease::default() }),
        };
        lease.spec = Some(*new);
        let written = if created {
            self.api.create(&PostParams::default(), &lease).await
        } else {
            self.api.replace(&self.election.name, &PostParams::default(), &lease).await
        };
        match written {
            Ok(lease) => {
                self.observed = Observation { spec: lease.spec, at: Instant::now() };
                Ok(true)
            }
            Err(e) if matches!(classify(&e), Class::Conflict | Class::AlreadyExists) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn metadata(&self) -> ObjectMeta {
        ObjectMeta {
            name: Some(self.election.name.clone()),
            namespace: Some(self.election.namespace.clone()),
            ..ObjectMeta::default()
        }
    }

    async fn acquire(&mut self, shutdown: &CancellationToken) -> bool {
        let mut told = false;
        loop {
            let pause = match self.attempt().await {
                Ok(true) => return true,
                Ok(false) => RETRY,
                Err(error) => {
                    if !told {
                        tracing::info!(lease = %self.election.name, %error, "cannot reach the lease yet");
                        told = true;
                    }
                    UNREACHABLE_RETRY
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return false,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Renews until the lease is lost.
    async fn hold(&mut self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RETRY).await;
            match tokio::time::timeout(RENEW_DEADLINE, self.attempt()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::debug!(%error, "cannot renew the lease"),
                Err(_elapsed) => {}
            }
            if renewed.elapsed() >= RENEW_DEADLINE {
                tracing::error!(lease = %self.election.name, "lost the lease");
                return;
            }
        }
    }

    /// Gives the lease back, so that the next holder need not wait for it to run out.
    async fn release(&mut self) {
        let current = match found(self.api.get(&self.election.name).await) {
            Ok(lease) => lease,
            Err(error) => return tracing::debug!(%error, "cannot release the lease"),
        };
        let Some(mut lease) = current else { return };
        let holder = lease.spec.as_ref().and_then(|s| s.holder_identity.as_deref());
        if holder != Some(self.election.identity.as_str()) {
            return;
        }
        let transitions = lease.spec.as_ref().and_then(|s| s.lease_transitions);
        let now = MicroTime(Timestamp::now());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: transitions,
            ..LeaseSpec::default()
        });
        if let Err(error) = self.api.replace(&self.election.name, &PostParams::default(), &lease).await {
            tracing::debug!(%error, "cannot release the lease");
        }
    }
}

/// How long a released lease may take to be written when the API server is going down too.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs `lead` whenever this candidate holds the lease; its token is cancelled when the lease is lost. Returns at
/// `shutdown`, after `lead` has returned and the lease is given back, or with the first error of `lead`.
pub async fn run<F, Fut, E>(
    client: kube::Client,
    election: &Election,
    shutdown: &CancellationToken,
    lead: F,
) -> Result<(), E>
where
    F: Fn(CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), E>>,
{
    let api = Api::namespaced(client, &election.namespace);
    let observed = Observation { spec: None, at: Instant::now() };
    let mut candidate = Candidate { api, election, observed };
    while candidate.acquire(shutdown).await {
        tracing::info!(lease = %election.name, identity = %election.identity, "leading");
        let term = shutdown.child_token();
        let held = async {
            tokio::select! {
                () = candidate.hold() => {}
                () = term.cancelled() => {}
            }
            term.cancel();
        };
        let led = async {
            let result = lead(term.clone()).await;
            term.cancel();
            result
        };
        let ((), result) = tokio::join!(held, led);
        if tokio::time::timeout(RELEASE_TIMEOUT, candidate.release()).await.is_err() {
            tracing::debug!(lease = %election.name, "no answer when releasing the lease");
        }
        result?;
        if shutdown.is_cancelled() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.into()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(transitions),
            acquire_time: Some(MicroTime(Timestamp::UNIX_EPOCH)),
            ..LeaseSpec::default()
        }
    }

    fn taken(current: Option<LeaseSpec>, observed_secs: u64) -> Option<LeaseSpec> {
        let now = Timestamp::from_second(100).expect("valid");
        match decide(current.as_ref(), Duration::from_secs(observed_secs), "me", now) {
            Decision::Take(spec) => Some(*spec),
            Decision::Wait => None,
        }
    }

    #[test]
    fn waits_for_another_holder_until_its_lease_has_run_out() {
        assert!(taken(Some(lease("you", 3)), 14).is_none());
        let spec = taken(Some(lease("you", 3)), 15).unwrap();
        assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("me"), Some(4)));
    }

    #[test]
    fn takes_a_free_an_absent_and_its_own_lease_at_once() {
        assert_eq!(taken(None, 0).unwrap().lease_transitions, Some(0));
        assert_eq!(taken(Some(lease("", 3)), 0).unwrap().lease_transitions, Some(4));
        let own = taken(Some(lease("me", 3)), 0).unwrap();
        assert_eq!(own.lease_transitions, Some(3));
        assert_eq!(own.acquire_time, Some(MicroTime(Timestamp::UNIX_EPOCH)));
    }
}
