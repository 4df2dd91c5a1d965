FROM python:3.12-slim
WORKDIR /shop
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY catga_tasks catga_tasks
COPY migrations migrations
RUN pip install --no-cache-dir --constraint constraints.txt '.[redis,nats,postgres,flower]'
COPY workers workers
RUN useradd --system shop
USER shop
