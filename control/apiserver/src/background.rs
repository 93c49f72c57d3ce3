//! Owns what a server does without being asked: events expire, the store is compacted, aggregated roles are filled,
//! allocations are repaired.

use crate::alloc;
use crate::api::Api;
use crate::identity::{MASTERS, User};
use crate::registry::{Change, update_object};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};
use weft_control_api::kinds;
use weft_control_store::{Condition, Op, Revision};

/// How often expired events are looked for.
const EVENT_PERIOD: Duration = Duration::from_secs(60);
/// The group of roles and bindings.
const RBAC: &str = "rbac.authorization.k8s.io";

/// Works until the server stops.
pub(crate) async fn run(api: Arc<Api>) {
    let shutdown = api.shutdown.clone();
    let work = async {
        tokio::join!(expire_events(&api), compact(&api), aggregate_roles(&api), alloc::repair(&api));
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

/// Deletes events that weren't written for their time to live. Which revision was how long ago is remembered,
/// so no event is parsed; after a restart every event lives once more.
async fn expire_events(api: &Arc<Api>) {
    let Some(events) = api.resources.by_plural("", "events").cloned() else { return };
    let mut clock: VecDeque<(Instant, u64)> = VecDeque::new();
    let mut ticks = tokio::time::interval(EVENT_PERIOD.min(api.config.event_ttl));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let now = ticks.tick().await;
        clock.push_back((now, api.cache.revision()));
        let mut expired = 0;
        while let Some((since, revision)) = clock.front().copied() {
            if now.duration_since(since) < api.config.event_ttl {
                break;
            }
            expired = revision;
            clock.pop_front();
        }
        if expired == 0 {
            continue;
        }
        for item in api.cache.snapshot(events.id).objects.values().filter(|item| item.revision <= expired) {
            let key = events.store_key(&item.key);
            let unchanged = vec![Condition::ModRevision(key.clone(), Revision(item.revision))];
            if let Err(error) = api.store.txn(unchanged, vec![Op::Delete { key }]).await {
                tracing::warn!(error = %crate::cache::Chain(&error), "an expired event couldn't be deleted");
                break;
            }
        }
    }
}

/// Compacts to where the store was one interval ago, so that slow readers and watches still find their revision.
async fn compact(api: &Arc<Api>) {
    let mut before = 0;
    let mut ticks = tokio::time::interval(api.config.compaction_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if before > 0
            && let Err(error) = api.store.compact(Revision(before)).await
        {
            tracing::warn!(error = %crate::cache::Chain(&error), "the store couldn't be compacted");
        }
        before = api.cache.revision();
    }
}

/// Writes the rules that aggregated cluster roles have into them, for those who read them.
async fn aggregate_roles(api: &Arc<Api>) {
    let Some(roles) = api.resources.by_plural(RBAC, "clusterroles").cloned() else { return };
    let Some(kind) = kinds::find(RBAC, "v1", "clusterroles") else { return };
    let user = User::new("system:apiserver", &[MASTERS]);
    let mut changed = api.cache.subscribe(roles.id);
    loop {
        for (name, rules) in api.authorizer.rbac().aggregated() {
            let wanted: Vec<Value> = rules.iter().map(rule_value).collect();
            let change = Change { kind, namespace: "", name: &name, subresource: "", dry_run: false };
            let outcome = update_object(api, &user, &change, |old| {
                let mut new = old.clone();
                new["rules"] = json!(wanted);
                Ok(new)
            })
            .await;
            match outcome {
                Ok(_) => {}
                Err(status) if status.code() == 404 || status.code() == 409 => {}
                Err(status) => tracing::warn!(role = name, error = %status, "a role couldn't be aggregated"),
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

fn rule_value(rule: &crate::authz::Rule) -> Value {
    let mut value = json!({"verbs": rule.verbs});
    let rows = [
        ("apiGroups", &rule.api_groups),
        ("resources", &rule.resources),
        ("resourceNames", &rule.resource_names),
        ("nonResourceURLs", &rule.non_resource_urls),
    ];
    for (key, list) in rows {
        if !list.is_empty() {
            value[key] = json!(list);
        }
    }
    value
}
