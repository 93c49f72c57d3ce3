//! What is left of a pod, and how it goes.

use super::Worker;
use crate::pod::PodId;
use crate::shared::Shared;
use crate::volumes;
use weft_agent_runtime::chain;

impl Worker {
    pub(super) fn release_volumes(&mut self) {
        self.keeper = None;
        self.probes.clear();
    }

    /// Removes every trace: records, logs, folder, tokens.
    pub(super) async fn clean_up(&mut self) {
        self.release_volumes();
        let newest = self.observed.sandbox.take().map(|s| s.id);
        for id in self.older.drain(..).chain(newest) {
            if let Err(error) = self.shared.runtime.remove_sandbox(&id).await {
                tracing::warn!(pod = %self.id, error = %chain(&error), "cannot remove sandbox");
            }
        }
        remove_folders(&self.shared, &self.id).await;
        let key = (self.id.namespace.clone(), self.id.name.clone());
        let mut pods = self.shared.pods.write();
        // A new pod of the same name may be there already.
        if pods.get(&key).is_some_and(|v| v.pod.metadata.uid.as_deref() == Some(&self.id.uid)) {
            pods.remove(&key);
        }
    }
}

/// Removes a pod's folder, its mounts, its logs and its tokens.
pub(crate) async fn remove_folders(shared: &Shared, id: &PodId) {
    shared.tokens.forget(&id.uid);
    let dir = shared.config.pods_dir().join(&id.uid);
    let in_memory = shared.config.memory_dir().join(&id.uid);
    let logs = shared.config.pod_log_dir.join(id.log_folder());
    let removal = tokio::task::spawn_blocking(move || {
        // The pod's folder last: by it the next start knows what is left.
        for folder in [&logs, &in_memory] {
            volumes::remove::folder(folder)?;
        }
        volumes::remove::pod_dir(&dir)
    });
    match removal.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(pod = %id, %error, "cannot remove the folders of a pod; the next start tries again")
        }
        Err(error) => tracing::warn!(pod = %id, %error, "cannot remove the folders of a pod"),
    }
}
