//! Life-cycle hooks (postStart, preStop), and commands run in a container with their output collected.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{LifecycleHandler, Pod};
use tokio::io::AsyncReadExt;
use weft_agent_runtime::{self as runtime, Runtime, Stdio};

use crate::http_get::{self, Target};

/// So much of a command's output is kept (upstream's bound for probes).
const MAX_OUTPUT: u64 = 10 * 1024;
/// Output may come so long after the command has ended.
const OUTPUT_LINGER: Duration = Duration::from_millis(100);
/// A hook by HTTP is given so long.
const HTTP_TIMEOUT: Duration = Duration::from_secs(30);

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("command '{command}' exited with {code}: {output}")]
    Exit { command: String, code: i32, output: String },
    #[error("{0}")]
    Http(String),
    #[error("cannot run the command")]
    Runtime(#[from] ExecError),
    #[error("port of the hook not found")]
    NoPort,
}

/// A command could not be run in a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    #[error("cannot make a pipe")]
    Pipe(#[source] std::io::Error),
}

/// Exit code and output (standard output and error together) of a command in a container.
pub(crate) async fn run_command(
    runtime: &Arc<dyn Runtime>,
    container_id: &str,
    command: Vec<String>,
) -> Result<(i32, String), ExecError> {
    let (mut reader, output) = output_pipe().map_err(ExecError::Pipe)?;
    let error = output.try_clone().map_err(ExecError::Pipe)?;
    let stdio = Stdio { stdout: Some(output), stderr: Some(error), ..Stdio::default() };
    let mut kept = Vec::new();
    let exec = runtime.exec(container_id, command, stdio);
    let collect = async {
        // An unreadable pipe only costs the text of a message; the exit code decides.
        let _ = (&mut reader).take(MAX_OUTPUT).read_to_end(&mut kept).await;
        let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
    };
    let code = {
        let mut exec = std::pin::pin!(exec);
        let mut collect = std::pin::pin!(collect);
        tokio::select! {
            code = &mut exec => {
                // A child of the command may hold the pipe open: take what is there, don't wait for it.
                let _ = tokio::time::timeout(OUTPUT_LINGER, collect).await;
                code?
            }
            () = &mut collect => exec.await?,
        }
    };
    Ok((code, String::from_utf8_lossy(&kept).into_owned()))
}

/// A pipe whose read end is asynchronous.
pub(crate) fn output_pipe() -> std::io::Result<(tokio::net::unix::pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&read, true)?;
    Ok((tokio::net::unix::pipe::Receiver::from_owned_fd(read)?, write))
}

/// Runs a hook of a container to its end. The caller bounds the time.
pub(crate) async fn run(
    runtime: &Arc<dyn Runtime>,
    (pod, container, container_id): (&Pod, &str, &str),
    handler: &LifecycleHandler,
    pod_ip: &str,
) -> Result<(), Error> {
    if let Some(exec) = &handler.exec {
        let command = exec.command.clone().unwrap_or_default();
        let (code, output) = run_command(runtime, container_id, command.clone()).await?;
        if code != 0 {
            return Err(Error::Exit { command: command.join(" "), code, output });
        }
    } else if let Some(action) = &handler.http_get {
        let target = Target::of(pod, container, action, pod_ip).ok_or(Error::NoPort)?;
        let answer = http_get::get(&target, HTTP_TIMEOUT).await.map_err(Error::Http)?;
        if answer.code >= 400 {
            return Err(Error::Http(format!(
                "HTTP hook answered with status {}: {}",
                answer.code, answer.body
            )));
        }
    } else if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
    }
    Ok(())
}
