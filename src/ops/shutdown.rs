//! One signal, seen by all.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Turns true when the process is asked to end.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Listens for SIGTERM and SIGINT.
    pub fn on_signal() -> std::io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("shutting down");
            // Without a receiver nobody is left to tell.
            let _ = sender.send(true);
        });
        Ok(Self(receiver))
    }

    /// Whether the process was asked to end.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    /// Completes when the process is asked to end.
    pub async fn requested(&mut self) {
        // An error means that the sender is gone, which it is only after the signal.
        let _ = self.0.wait_for(|requested| *requested).await;
    }
}
