//! Owns a store for the tests, until the embedded one is there.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use weft_control_store::*;

pub(crate) async fn open(_dir: &Path) -> Arc<dyn Store> {
    Arc::new(Memory { state: Mutex::default(), sender: tokio::sync::broadcast::Sender::new(100_000) })
}

#[derive(Default)]
struct State {
    revision: u64,
    map: BTreeMap<String, KeyValue>,
    log: Vec<Batch>,
}

struct Memory {
    state: Mutex<State>,
    sender: tokio::sync::broadcast::Sender<Batch>,
}

#[async_trait::async_trait]
impl Store for Memory {
    async fn txn(&self, conditions: Vec<Condition>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        let mut state = self.state.lock().unwrap();
        let holds = conditions.iter().all(|c| match c {
            Condition::Absent(key) => !state.map.contains_key(key),
            Condition::ModRevision(key, rev) => state.map.get(key).is_some_and(|kv| kv.mod_revision == *rev),
        });
        if !holds {
            let found = conditions
                .iter()
                .map(|c| match c {
                    Condition::Absent(key) | Condition::ModRevision(key, _) => state.map.get(key).cloned(),
                })
                .collect();
            return Ok(TxnOutcome::Conflict(found));
        }
        state.revision += 1;
        let revision = Revision(state.revision);
        let mut events = Vec::new();
        for op in ops {
            match op {
                Op::Put { key, value } => {
                    let value: Bytes = value;
                    let kv = KeyValue { key: key.clone(), value, create_revision: revision, mod_revision: revision };
                    let prev = state.map.insert(key, kv.clone());
                    events.push(Event::Put { kv, prev });
                }
                Op::Delete { key } => {
                    if let Some(prev) = state.map.remove(&key) {
                        events.push(Event::Delete { key, revision, prev: Some(prev) });
                    }
                }
            }
        }
        let batch = Batch { revision, events };
        state.log.push(batch.clone());
        let _ = self.sender.send(batch);
        Ok(TxnOutcome::Committed(revision))
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        Ok(self.state.lock().unwrap().map.get(key).cloned())
    }

    async fn range(&self, range: Range, _revision: Revision, limit: usize) -> Result<Page, Error> {
        let state = self.state.lock().unwrap();
        let mut items: Vec<KeyValue> = state
            .map
            .range(range.start..)
            .take_while(|(k, _)| range.end.as_ref().is_none_or(|end| *k < end))
            .map(|(_, kv)| kv.clone())
            .collect();
        let more = limit > 0 && items.len() > limit;
        if more {
            items.truncate(limit);
        }
        Ok(Page { revision: Revision(state.revision), items, more })
    }

    async fn watch(&self, range: Range, after: Revision) -> Result<Watch, Error> {
        use futures::StreamExt;
        let state = self.state.lock().unwrap();
        let receiver = self.sender.subscribe();
        let old: Vec<Batch> = state.log.iter().filter(|b| b.revision > after).cloned().collect();
        let live = futures::stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await.ok()?, receiver))
        });
        Ok(futures::stream::iter(old)
            .chain(live)
            .map(move |mut batch| {
                batch.events.retain(|e| {
                    let key = match e {
                        Event::Put { kv, .. } => &kv.key,
                        Event::Delete { key, .. } => key,
                    };
                    *key >= range.start && range.end.as_ref().is_none_or(|end| key < end)
                });
                Ok(batch)
            })
            .boxed())
    }

    async fn current_revision(&self) -> Result<Revision, Error> {
        Ok(Revision(self.state.lock().unwrap().revision))
    }

    async fn compact(&self, _revision: Revision) -> Result<(), Error> {
        Ok(())
    }
}
