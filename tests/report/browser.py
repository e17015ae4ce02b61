"""Opens a page in Chromium without a window, and prints as JSON what it shows: python browser.py PAGE [PICTURE]."""

import json
import os
import sys

# What a page says of itself once it is laid out: drawings and rows that are seen, what was fetched, and its width.
LOOK = """
JSON.stringify({
  title: document.title,
  drawings: [...document.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().height > 20).length,
  curves: [...document.querySelectorAll('polyline')].filter(one => one.getTotalLength() > 20).length,
  rows: [...document.querySelectorAll('tbody tr')].filter(one => one.offsetHeight > 10).length,
  fetched: performance.getEntriesByType('resource').map(one => one.name),
  wider: document.documentElement.scrollWidth > document.documentElement.clientWidth,
})
"""


def main() -> None:
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    said = []

    class Listening(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):  # Qt's name
            said.append(message)

    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(900, 1400)
    view.setPage(Listening(view))

    def found(answer: str) -> None:
        if len(sys.argv) > 2:
            view.grab().save(sys.argv[2])
        print(json.dumps({**json.loads(answer), "said": said}))
        application.quit()

    view.loadFinished.connect(lambda good: view.page().runJavaScript(LOOK, found) if good else application.exit(1))
    view.load(QUrl.fromLocalFile(os.path.abspath(sys.argv[1])))
    view.show()
    QTimer.singleShot(60_000, lambda: application.exit(2))
    sys.exit(application.exec())


if __name__ == "__main__":
    main()
