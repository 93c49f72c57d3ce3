//! The program: parameters from the environment, configuration from standard input, the answer to standard output.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

/// It keeps what is freed. The C library's gives memory back to the kernel and takes it again with each answer that is read, which
/// in a process of a millisecond is a fifth of it.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// More than any configuration has.
const MAX_INPUT_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    let mut input = Vec::new();
    let read = std::io::stdin().lock().take(MAX_INPUT_BYTES).read_to_end(&mut input);
    let outcome = read.map_err(weft_cni_plugin::unreadable);
    let outcome = outcome.and_then(|_| weft_cni_plugin::run(|name| std::env::var(name).ok(), &input));
    let (answer, code) = match outcome {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(report) => (report, ExitCode::FAILURE),
    };
    match std::io::stdout().lock().write_all(answer.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
